"""A life with many erasure requests: `perta requests`.

    FOLDER/ledger.jsonl, head.json   what happened, chained and signed (`store.ledger`)
    FOLDER/rows/NAME.jsonl             the rows of a request, until `clean`
    FOLDER/key                       of the fingerprints of these rows; without it they say nothing
    FOLDER/checkpoints/N             the checkpoint after entry N, with its `perta unlearn` record
    FOLDER/checkpoints/N.sig         its signature, where it was signed (`store.signing`)
    FOLDER/work/N                    what that run made on the way
    FOLDER/moments                   of retained rows, made once, without those of any request; its
                                     hashes of rows are keyed
    FOLDER/audits/N/NAME             the audit of a request's rows that entry N names; numbers alone

A request is applied to the current checkpoint, several at once in one edit. Rows of all requests so
far are taken out of the retain set first, so nothing protects what is to go.
"""

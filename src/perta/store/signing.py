"""Signatures: Ed25519 over entries of a ledger, OpenSSF model signing over whole checkpoints.

A checkpoint's signature is a file beside it, a Sigstore bundle: ECDSA over the SHA-256 of every
file in the folder. The command `model_signing` of that project checks it as well.

Sources: RFC 8032; OpenSSF Model Signing v1.0, github.com/sigstore/model-transparency.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta.errors import ConfigError, LedgerError, PertaError, first_line
from perta.store.atomic import atomic_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAKE_ENTRY_KEY = "openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_MODEL_KEY = (
    "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out model-key.pem"
)


def entry_key(file: Path) -> Ed25519PrivateKey:
    """The key of a PEM file without a password, to sign entries with; a ConfigError without one."""
    _required("cryptography", "sign", "Signing", ConfigError)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = _private_key(file, "key", _MAKE_ENTRY_KEY)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"--key {file} is not an Ed25519 key. Make one with `{_MAKE_ENTRY_KEY}`.")
    return key


def sign_hash(key: Ed25519PrivateKey, sha256: str) -> dict[str, str]:
    """The signature of a hash's 32 bytes, and the public key, in hexadecimal."""
    return {
        "ed25519": key.sign(bytes.fromhex(sha256)).hex(),
        "public_key": key.public_key().public_bytes_raw().hex(),
    }


def check_hash(sha256: str, signature: Any, where: str) -> None:
    """Stop with a LedgerError at what is no `sign_hash` of a hash; `where` is for the message."""
    _required("cryptography", "sign", f"{where} is signed, and checking that", LedgerError)
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        parts = {name: bytes.fromhex(signature[name]) for name in ("ed25519", "public_key")}
        if signature != {name: part.hex() for name, part in parts.items()}:
            raise ValueError("spaces, capitals, or more than there should be")
        public = Ed25519PublicKey.from_public_bytes(parts["public_key"])
        public.verify(parts["ed25519"], bytes.fromhex(sha256))
    except (InvalidSignature, ValueError, KeyError, TypeError):
        raise LedgerError(f"{where}: its signature does not fit it.") from None


def public_key(file: Path) -> str:
    """A public key as entries and checkpoints name it: Ed25519 in hexadecimal, others as PEM."""
    _required("cryptography", "sign", "--public-key", ConfigError)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"--public-key {file} is no public key that can be read ({first_line(error)}). Make it "
            "of a private one with `openssl pkey -in key.pem -pubout -out public.pem`."
        ) from error
    if isinstance(key, Ed25519PublicKey):
        return key.public_bytes_raw().hex()
    if isinstance(key, EllipticCurvePublicKey):
        return _pem(key)
    raise ConfigError(f"--public-key {file} is neither an Ed25519 key nor one of a curve.")


def model_key(file: Path) -> str:
    """The public half, PEM, of a key that can sign checkpoints; a ConfigError if it cannot."""
    _required("model_signing", "signing", "--model-key", ConfigError)
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    key = _private_key(file, "model-key", _MAKE_MODEL_KEY)
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise ConfigError(
            f"--model-key {file}: OpenSSF model signing takes keys of the curves P-256, P-384 and "
            f"P-521. Make one with `{_MAKE_MODEL_KEY}`."
        )
    return _pem(key.public_key())


def sign_checkpoint(folder: Path, signature: Path, key: Path) -> dict[str, str]:
    """Sign every file of a folder into `signature`, in place of one that is there.

    Returns the public key, and the SHA-256 of the file, for `check_checkpoint`.
    """
    public = model_key(key)
    signing = _required("model_signing", "signing", "--model-key", ConfigError).signing
    with atomic_file(signature, overwrite=True) as partial:
        signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, partial)
    return {"public_key": public, "sha256": hashlib.sha256(signature.read_bytes()).hexdigest()}


def check_checkpoint(folder: Path, signature: Path, signed: Mapping[str, str]) -> None:
    """Stop with a LedgerError where a folder is not what `sign_checkpoint` signed."""
    what = f"{folder} is signed, and checking that"
    verifying = _required("model_signing", "signing", what, LedgerError).verifying
    try:
        found = hashlib.sha256(signature.read_bytes()).hexdigest()
    except OSError as error:
        raise LedgerError(
            f"{signature}, the signature of {folder.name}, cannot be read ({error.strerror})."
        ) from error
    if found != signed["sha256"]:
        raise LedgerError(f"{signature} is not the signature that the ledger names.")
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(signed["public_key"])
        file.flush()
        try:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(file.name))
            verifier.verify(folder, signature)
        except Exception as error:  # of several libraries, each with its own
            raise LedgerError(
                f"{folder} does not fit its signature: {first_line(error)} Put the files back."
            ) from error


def check_signed_by(named: Mapping[str, str | None], trusted: Sequence[str]) -> None:
    """Stop with a LedgerError unless each of some things is signed with one of the trusted keys.

    `named` has the public key of each, None of what is not signed.
    """
    for what, key in named.items():
        if key is None:
            raise LedgerError(f"{what} is not signed, and --public-key wants it to be.")
        if key not in trusted:
            raise LedgerError(
                f"{what} is signed with another key than --public-key: {short(key)}. Somebody else "
                "wrote it, or the key was changed."
            )


def is_model_key(public: str) -> bool:
    """Whether a public key is one of checkpoints."""
    return public.startswith("-----BEGIN")


def short(public: str) -> str:
    """A public key on one line: itself in hexadecimal, or the SHA-256 of its PEM."""
    if is_model_key(public):
        return f"SHA-256 {hashlib.sha256(public.encode()).hexdigest()}"
    return public


def _private_key(file: Path, option: str, make: str) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"--{option} {file} is no private key that can be read ({first_line(error)}). Make one "
            f"with `{make}`."
        ) from error


def _pem(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    made: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return made.decode("ascii")


def _required(module: str, extra: str, what: str, error: type[PertaError]) -> Any:
    """A package that signing needs, or an error that says of what and how to get it."""
    try:
        return import_module(module)
    except ImportError:
        name = module.replace("_", "-")
        raise error(f"{what} needs the package `{name}`: pip install 'perta[{extra}]'.") from None

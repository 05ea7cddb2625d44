"""Methods side by side: the same models, the same rows, equal forgetting, several seeds.

spec    which method with which settings
draw    the sets of one seed, and the models tuned on them
model   one model in memory, moved from strength to strength, and what can be asked of it
search  the strength at which a method forgets as much as retraining does
study   every method on every seed; one record per finished run
summary records -> means with spread, tables
"""

"""How far an edit goes: the model in memory at any strength, rounds of tuning, the search."""

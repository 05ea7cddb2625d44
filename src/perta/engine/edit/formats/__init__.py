"""An edit stored as something else than a checkpoint of plain numbers."""

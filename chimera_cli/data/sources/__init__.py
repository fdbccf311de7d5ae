"""Where data sets come from: a source says what its photos, splits and captions are; the pack does the rest."""

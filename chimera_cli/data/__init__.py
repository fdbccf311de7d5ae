"""Sources become packs; packs become batches."""

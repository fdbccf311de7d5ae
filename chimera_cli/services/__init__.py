"""One module per command: configuration in, objects joined, result files written, a plain result out."""

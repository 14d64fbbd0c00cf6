"""Everything that knows transformers. Facts about the seam are in docs/architecture.md, section 6."""

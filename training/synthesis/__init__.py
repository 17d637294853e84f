"""Training images that are drawn from label maps: the data source of the brain student."""

"""Random small models against the analysis: what is folded must leave every output as it was."""

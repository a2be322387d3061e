"""Rewriting hand-written batch norms of any form, against the source's own run."""

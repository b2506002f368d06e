"""The peak memory of a trial and of a refinement step: what `automerge.searching.memory` says, and what it is."""

"""Times: rooflines, boards, this machine."""

"""Which dimensions belong together, and the network without some of them."""

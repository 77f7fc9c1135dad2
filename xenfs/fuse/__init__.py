"""FUSE on the raw descriptor: protocol, session, mount, descriptor loop."""

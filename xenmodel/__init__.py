"""xenmodel: a small Xen: domains with memory, grant tables, event channels and a xenstore. No I/O."""

"""xenstore: the tree of names and values through which Xen's domains find one another, in process.

Read path, perms, quota, then transaction (nodes and versions), watch, store (the rules), connection (one
client's requests) and client (what drivers use). No I/O and no wire format here: a request is a method
call.
"""

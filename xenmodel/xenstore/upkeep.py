"""upkeep.py: what the daemon does to its own store: `check` it, and live update, which writes it down and reads it again.

Both look at every node at once, and are for the control domain only.
"""

from __future__ import annotations

from xenmodel.xenstore import path as paths
from xenmodel.xenstore.dump import format_node, parse
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.transaction import Node, Tree, cost
from xenmodel.xenstore.watch import WatchTable


def problems(store: Store) -> list[str]:
    """What is wrong with the tree, a sentence each: it would be our fault."""
    found, tree = [], store.tree
    owned = {path: domid for domid, names in tree.owned.items() for path in names}
    memory = dict.fromkeys(tree.memory, 0)
    for path, node in tree.nodes.items():
        owner = node.perms[0].domid
        memory[owner] = memory.get(owner, 0) + cost(path, node)
        if owned.get(path) != owner:
            found.append(f"{path} belongs to domain {owner} and is counted for {owned.get(path)}")
        if node.children_bytes != len(node.names()):
            found.append(f"{path} counts {node.children_bytes} bytes of names and has {len(node.names())}")
        found += [f"{path} has a child {name} that is not there" for name in node.children
                  if paths.child(path, name) not in tree.nodes]  # fmt: skip
        above = tree.nodes.get(paths.parent(path))
        listed = above is not None and paths.name_of(path) in above.children
        if not listed and path != paths.ROOT and not paths.is_special(path):
            found.append(f"{path} is not among the children of the node above it")
    for record in store.domains.all():
        mine = list(record.connections)
        transactions = [transaction for each in mine for transaction in each.transactions.values()]
        watches = [watch for each in mine for watch in each.watches.values()]
        bytes_ = sum(len(watch.path) + len(watch.token) for watch in watches)
        bytes_ += sum(transaction.memory for transaction in transactions) + sum(each.event_memory() for each in mine)
        events = sum(each.pending_events for each in mine)
        counted = (record.watches, record.transactions, record.events, record.memory)
        if counted != (len(watches), len(transactions), events, bytes_):
            found.append(f"domain {record.domid} is not counted right: {record}")
    if len(owned) != len(tree.nodes) or memory != tree.memory:
        found.append("what the domains own is not what is there")
    return found


def reload(store: Store) -> None:
    """Write the tree down as text, build a new one from that, and give it to the store with everybody's watches.

    Transactions must have ended. Generations go on from where they were, so nobody takes an old list of names for a new one.
    """
    text = [format_node(path, value, perms) for path, value, perms in store.dump()]
    text += [format_node(path, None, store.tree.live_perms(store.tree.nodes[path])) for path in paths.SPECIALS]
    tree = Tree()
    tree.generation = store.tree.generation
    for entry in parse(text):
        old = tree.nodes.get(entry.path)
        children, size = ({}, 0) if old is None else (old.children, old.children_bytes)
        node = Node(entry.value or b"", tuple(entry.perms), tree.tick(), children, size)
        tree.replace(entry.path, node)
        if old is None:
            above = paths.parent(entry.path)
            parent = tree.nodes[above]
            name = paths.name_of(entry.path)
            parent.children[name] = None
            tree.replace(above, Node(parent.value, parent.perms, tree.tick(), parent.children,
                                     parent.children_bytes + len(name) + 1))  # fmt: skip
    watches = WatchTable()
    connections = [connection for record in store.domains.all() for connection in record.connections]
    for watch in sorted((w for c in connections for w in c.watches.values()), key=lambda watch: watch.order):
        watches.add(watch)
    store.adopt(tree, watches)

"""Our xenstored beside Debian's C daemon of Xen 4.17: the same requests, every reply and every event compared.

rig.py drives both; ours.py is our side; differences.py is the one table of what is not the same, and why.
"""

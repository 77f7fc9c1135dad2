"""sysdev: console, control, balloon, PCI. Nothing is here yet: they come after the disks and the network."""

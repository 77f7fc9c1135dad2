"""netdev: the vif device. Nothing is here yet: the network comes after the disks."""

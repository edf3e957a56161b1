//! Real QEMU in network and mount namespaces: the lab, the probe, the load.

//! The protocol by which a VM changes hosts, as pure step functions.

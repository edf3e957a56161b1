//! What a hypervisor must offer: a closed interface.

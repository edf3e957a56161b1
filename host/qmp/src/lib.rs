//! A typed QMP codec and session. Knows no VMs.

//! Real QEMU in network and mount namespaces: the lab, the probe, the load.
//!
//! ```text
//!  root namespace         switch namespace              one namespace a host
//!  controller, CLI        +--------------+
//!  10.90.K.1  gwID-u -----| br-u         |---- u0   10.90.K.1N   agent, QEMU
//!  10.91.K.1  gwID-v -----| br-v         |---- vm0  uplink of the host's bridge
//!                         +--------------+
//!                                \------------ vm0  10.91.K.2    probe, load (client)
//! ```
//!
//! Invariants:
//! - A host is a network *and* a mount namespace: it sees its own state, the
//!   shared pool and nothing of the other hosts but packets.
//! - Everything of a lab is found again by its id alone, so that a lab whose
//!   owner died is removed by whoever comes next, and nothing is ever killed
//!   by a program's name.
//! - What is measured is measured from outside: the probe and the load live in
//!   the client's namespace and know nothing of Godwit.

pub mod api;
pub mod cluster;
pub mod download;
pub mod fixture;
pub mod http;
pub mod lab;
pub mod load;
pub mod moving;
pub mod probe;
pub mod receipt;
pub mod run;
pub mod stranger;
pub mod suite;
pub mod terminal;
pub mod traces;

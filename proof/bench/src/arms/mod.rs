//! The arms: each a frozen way to move the same guest from one host to another.

mod godwit;
mod libvirt;
mod qemu;
mod qemu_default;
mod qemu_tuned;
mod qemu_tuned_tls;

pub use godwit::Godwit;
pub use libvirt::{Libvirt, PRIVATE as LIBVIRT_PRIVATE};
pub use qemu_default::QemuDefault;
pub use qemu_tuned::QemuTuned;
pub use qemu_tuned_tls::QemuTunedTls;

use crate::guest::Guest;
use anyhow::Result;
use e2e::lab::Lab;
use std::net::Ipv4Addr;

/// What an arm works with.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The hosts and wires.
    pub lab: &'a Lab,
    /// The guest.
    pub guest: &'a Guest,
}

/// One way to run and move the guest.
pub trait Arm {
    /// Its name in tables.
    fn name(&self) -> &'static str;

    /// Boots a fresh guest on the first host; returns its address, which may
    /// not answer yet.
    ///
    /// # Errors
    /// When it does not start.
    fn boot(&mut self, bench: &Bench<'_>) -> Result<Ipv4Addr>;

    /// Moves the guest live to the second host, from the request to the end.
    ///
    /// # Errors
    /// When it fails.
    fn migrate(&mut self, bench: &Bench<'_>) -> Result<Moved>;

    /// Ends the guest wherever it is.
    ///
    /// # Errors
    /// When something of it stays.
    fn end(&mut self, bench: &Bench<'_>) -> Result<()>;
}

/// What an arm itself can say about a move; the network is watched from outside.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// From the request until the guest runs on the destination, ms.
    pub request_to_running_ms: f64,
    /// From the request until the command is done, ms.
    pub total_ms: f64,
    /// QEMU's STOP on the source to RESUME on the destination, ms, where it can be seen.
    pub qemu_downtime_ms: Option<f64>,
    /// Bytes that the source sent, where it says so.
    pub bytes: Option<f64>,
}

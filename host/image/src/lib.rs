//! Images, copy-on-write overlays, the micro and Debian templates: everything a host does with files that guests boot from.
//!
//! ```text
//!   packages ─> micro::build ──> template directory (kernel, initrd, disk, manifest.json)
//!            └> debian::build ─> template directory (disk, manifest.json)
//!                                        │
//!   a stranger's file ─> vet ─> import ──┴─> blobs/<sha256>   read-only, shared by all VMs
//!                                                 │ backing
//!                                          volumes/<uuid>.<format>   one VM's own, 0600
//! ```
//!
//! Invariants:
//! - A format is recorded once and always passed on; nothing is ever probed again, because a guest may have written a
//!   header of its choice at the start of a raw disk.
//! - Names in a pool are made by us (digests, ids) and opened beneath the pool's root, following no symbolic link.
//! - An imported image is read by our strict reader first and by `qemu-img` only then, under limits of memory, processor
//!   time and output; what is kept is a fresh conversion, so nothing of the original's structure survives.
//! - A failure leaves no file behind. Programs run from argument vectors, with a deadline.

pub mod debian;
mod import;
mod iso;
pub mod micro;
mod pool;
pub mod process;
mod qcow2;
pub mod seed;
mod vet;
mod volume;

pub use import::{ImportError, ImportLimits, Imported};
pub use pool::{Capacity, Incoming, Pool, PoolError, ReceiveError};
pub use vet::{ImageInfo, Refusal, VIRTUAL_BYTES_MAX, vet};
pub use volume::{Base, OpenVolume, VolumeError, VolumeRequest, VolumeUsage};

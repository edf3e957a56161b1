//! What a tunnel process says of itself: a small JSON file, replaced in one step, that any agent can read at any time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How far a tunnel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its sockets are bound; the other host is not there yet.
    Listening,
    /// The other host is authenticated; the migration may begin.
    Connected,
    /// Guest bytes flow.
    Relaying,
    /// All connections ended in order. The process is ending.
    Closed,
    /// It gave up; see the error. The process is ending.
    Failed,
}

/// The status file. Byte counts are of guest data, without encryption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// [`super::VERSION`].
    pub version: u32,
    /// How far.
    pub phase: Phase,
    /// The TCP port of a destination.
    pub port: Option<u16>,
    /// QEMU's connections that are open now.
    pub channels_open: u32,
    /// QEMU's connections so far.
    pub channels_total: u32,
    /// Bytes from QEMU here to the other host.
    pub sent_bytes: u64,
    /// Bytes from the other host to QEMU here.
    pub received_bytes: u64,
    /// Connections turned away: strangers, wrong hosts, wrong tokens, too slow, too many.
    pub refused: u64,
    /// Why it failed.
    pub error: Option<String>,
}

impl TunnelStatus {
    /// Reads a status file; absent until the tunnel is up.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }
}

/// Writes the status file when it changed.
pub(super) struct StatusFile {
    path: PathBuf,
    written: Option<TunnelStatus>,
}

impl StatusFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, written: None }
    }

    /// No fsync: the file tells of a process, and does not outlive the machine's boot either.
    pub(super) fn write(&mut self, status: &TunnelStatus) -> io::Result<()> {
        if self.written.as_ref() == Some(status) {
            return Ok(());
        }
        let draft = self.path.with_extension("json.tmp");
        fs::write(&draft, serde_json::to_vec(status)?)?;
        fs::rename(&draft, &self.path)?;
        self.written = Some(status.clone());
        Ok(())
    }
}

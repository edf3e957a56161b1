//! What QEMU answers: only what is used, every field defaulted, unknown words kept.
//!
//! Sources: QEMU's `qapi/*.json`, seen on 7.2 and 10.0. A field that a QEMU does not send reads as zero, empty or `None`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::open_enum::open_enum;

/// The answer of a command that has nothing to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Empty {}

/// `query-version`, and part of the greeting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Version {
    /// Version of QEMU itself.
    pub qemu: VersionTriple,
    /// The distributor's own version text.
    pub package: String,
}

/// QEMU's version number. Ordered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(default)]
pub struct VersionTriple {
    /// First number; grows once a year.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 50 and more are development versions.
    pub micro: u32,
}

impl std::fmt::Display for VersionTriple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

open_enum! {
    /// What the machine is doing (`RunState`).
    RunState {
        /// Stopped by `stop`. Unlike `FinishMigrate`, QEMU does not leave this state by itself.
        Paused = "paused",
        Running = "running",
        /// Stopped by the migration itself: a late failure makes QEMU run the guest again by itself.
        FinishMigrate = "finish-migrate",
        /// Migrated away.
        PostMigrate = "postmigrate",
        /// Waits for or loads an incoming migration.
        InMigrate = "inmigrate",
        /// Started with `-S` and never run.
        Prelaunch = "prelaunch",
        Preconfig = "preconfig",
        Shutdown = "shutdown",
        Suspended = "suspended",
        IoError = "io-error",
        InternalError = "internal-error",
        GuestPanicked = "guest-panicked",
        Watchdog = "watchdog",
        Debug = "debug",
        RestoreVm = "restore-vm",
        SaveVm = "save-vm",
        Colo = "colo",
    }
}

open_enum! {
    /// Why QEMU ended (`ShutdownCause`).
    ShutdownCause {
        HostQmpQuit = "host-qmp-quit",
        HostQmpSystemReset = "host-qmp-system-reset",
        HostSignal = "host-signal",
        HostError = "host-error",
        HostUi = "host-ui",
        GuestShutdown = "guest-shutdown",
        GuestReset = "guest-reset",
        GuestPanic = "guest-panic",
        SubsystemReset = "subsystem-reset",
        SnapshotLoad = "snapshot-load",
    }
}

/// `query-status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StatusInfo {
    /// True when the guest's CPUs run.
    pub running: bool,
    /// What the machine is doing.
    pub status: RunState,
}

/// `query-kvm`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct KvmInfo {
    /// This machine runs on KVM.
    pub enabled: bool,
    /// KVM was compiled in.
    pub present: bool,
}

/// `query-name`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NameInfo {
    /// The text of `-name`.
    pub name: Option<String>,
}

/// `query-uuid`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct UuidInfo {
    /// The text of `-uuid`; zeros when none was given.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// One of `query-machines`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Machine {
    /// Exact name: `pc-q35-7.2`.
    pub name: String,
    /// Name that means the newest of its kind: `q35`.
    pub alias: Option<String>,
    /// The machine of a QEMU started without `-machine`.
    pub is_default: bool,
    /// Most virtual CPUs.
    pub cpu_max: u32,
    /// QEMU will drop it.
    pub deprecated: bool,
}

open_enum! {
    /// Where a migration is (`MigrationStatus`).
    MigrationStatus {
        None = "none",
        Setup = "setup",
        Active = "active",
        /// Waits for `migrate-continue`, the guest stopped.
        PreSwitchover = "pre-switchover",
        /// Sends the state of the devices.
        Device = "device",
        Completed = "completed",
        Failing = "failing",
        Failed = "failed",
        Cancelling = "cancelling",
        Cancelled = "cancelled",
        PostcopyDevice = "postcopy-device",
        PostcopyActive = "postcopy-active",
        PostcopyPaused = "postcopy-paused",
        PostcopyRecoverSetup = "postcopy-recover-setup",
        PostcopyRecover = "postcopy-recover",
        WaitUnplug = "wait-unplug",
        Colo = "colo",
    }
}

impl MigrationStatus {
    /// True when this migration will not go on by itself: ended or never begun.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self, Self::None | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// `query-migrate`. On the destination QEMU gives little more than the status.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Empty (`Other("")`) when there was never a migration.
    pub status: MigrationStatus,
    /// The guest's memory, from setup on.
    pub ram: Option<MigrationRam>,
    /// Blackout as QEMU measures it, in ms, once completed.
    #[serde(deserialize_with = "optional_count")]
    pub downtime: Option<u64>,
    /// What the blackout would be now, in ms.
    #[serde(deserialize_with = "optional_count")]
    pub expected_downtime: Option<u64>,
    /// Time before the first round, in ms.
    #[serde(deserialize_with = "optional_count")]
    pub setup_time: Option<u64>,
    /// Time since the start, in ms.
    #[serde(deserialize_with = "optional_count")]
    pub total_time: Option<u64>,
    /// How much auto-converge holds the guest's CPUs back, in per cent.
    #[serde(deserialize_with = "optional_count")]
    pub cpu_throttle_percentage: Option<u64>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// Why this VM cannot be migrated now.
    pub blocked_reasons: Vec<String>,
}

/// Counters of the guest's memory in a migration (`MigrationStats`).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MigrationRam {
    /// Bytes sent.
    #[serde(deserialize_with = "count")]
    pub transferred: u64,
    /// Bytes still dirty.
    #[serde(deserialize_with = "count")]
    pub remaining: u64,
    /// Size of the guest's memory, in bytes.
    #[serde(deserialize_with = "count")]
    pub total: u64,
    /// Pages of one value, sent as a mark.
    #[serde(deserialize_with = "count")]
    pub duplicate: u64,
    /// Pages sent whole.
    #[serde(deserialize_with = "count")]
    pub normal: u64,
    /// The same in bytes.
    #[serde(deserialize_with = "count")]
    pub normal_bytes: u64,
    /// Pages a second that the guest dirties.
    #[serde(deserialize_with = "count")]
    pub dirty_pages_rate: u64,
    /// Throughput, in Mbit/s.
    pub mbps: f64,
    /// How often the dirty log was read: the rounds.
    #[serde(deserialize_with = "count")]
    pub dirty_sync_count: u64,
    /// Size of a page, in bytes.
    #[serde(deserialize_with = "count")]
    pub page_size: u64,
    /// Bytes sent by multifd channels.
    #[serde(deserialize_with = "count")]
    pub multifd_bytes: u64,
    /// Pages a second sent.
    #[serde(deserialize_with = "count")]
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran.
    #[serde(deserialize_with = "count")]
    pub precopy_bytes: u64,
    /// Bytes sent in the blackout.
    #[serde(deserialize_with = "count")]
    pub downtime_bytes: u64,
    /// Bytes sent in the post-copy phase.
    #[serde(deserialize_with = "count")]
    pub postcopy_bytes: u64,
    /// Pages that the destination asked for in the post-copy phase.
    #[serde(deserialize_with = "count")]
    pub postcopy_requests: u64,
}

/// One switch of `query-migrate-capabilities` and `migrate-set-capabilities`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CapabilityState {
    /// QEMU's name: `return-path`, `late-block-activate` ...
    pub capability: String,
    /// On or off.
    pub state: bool,
}

/// One of `query-cpus-fast`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct CpuInfo {
    /// Number of the virtual CPU, from 0.
    pub cpu_index: u32,
    /// Its thread on the host.
    pub thread_id: i32,
}

/// One of `query-named-block-nodes`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name.
    pub node_name: String,
    /// Its driver: `file`, `qcow2`, `raw` ...
    pub drv: String,
    /// The file, as QEMU writes it.
    pub file: String,
    /// Read only.
    pub ro: bool,
    /// False on a destination before the disks were activated.
    #[serde(default = "yes")]
    pub active: bool,
    /// Its cache mode.
    pub cache: BlockCache,
}

/// Cache mode of a block node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BlockCache {
    /// The host's page cache is passed by (`O_DIRECT`).
    pub direct: bool,
    /// Flushes are not done.
    pub no_flush: bool,
}

/// One of `query-blockstats`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BlockStats {
    /// The block node.
    pub node_name: String,
    /// The device's path, when it has no other name.
    pub qdev: String,
    /// Its counters.
    pub stats: BlockCounters,
}

/// Counters of a block device since QEMU started (on this host).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BlockCounters {
    /// Bytes read.
    #[serde(deserialize_with = "count")]
    pub rd_bytes: u64,
    /// Bytes written.
    #[serde(deserialize_with = "count")]
    pub wr_bytes: u64,
    /// Reads.
    #[serde(deserialize_with = "count")]
    pub rd_operations: u64,
    /// Writes.
    #[serde(deserialize_with = "count")]
    pub wr_operations: u64,
    /// Flushes.
    #[serde(deserialize_with = "count")]
    pub flush_operations: u64,
}

/// `query-qmp-schema`, reduced to which names exist.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Schema {
    entries: Vec<SchemaEntry>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct SchemaEntry {
    name: String,
    meta_type: String,
}

impl Schema {
    /// Whether this QEMU has the command.
    #[must_use]
    pub fn has_command(&self, name: &str) -> bool {
        self.has("command", name)
    }

    /// Whether this QEMU has the event.
    #[must_use]
    pub fn has_event(&self, name: &str) -> bool {
        self.has("event", name)
    }

    fn has(&self, meta_type: &str, name: &str) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.meta_type == meta_type && entry.name == name)
    }
}

/// `add-fd`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct AddFdInfo {
    /// The set that it joined: `/dev/fdset/N`.
    pub fdset_id: u64,
    /// Its number inside QEMU.
    pub fd: i64,
}

/// What `yank` cuts: connections that make QEMU wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum YankInstance {
    /// The migration's connections.
    Migration,
    /// A block node's connection, such as NBD.
    BlockNode {
        /// Its name.
        #[serde(rename = "node-name")]
        node_name: String,
    },
    /// A character device's connection.
    Chardev {
        /// Its id.
        id: String,
    },
    /// A kind that this version of the crate does not know; never sent.
    #[serde(other)]
    Other,
}

fn yes() -> bool {
    true
}

/// QEMU's `int` counters may be signed, unsigned or (seldom) not a number: none of that fails a whole answer.
fn count<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Value::deserialize(deserializer).map(|value| value.as_u64().unwrap_or(0))
}

fn optional_count<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Value::deserialize(deserializer).map(|value| value.as_u64())
}

//! The commands, each a type with its arguments and its answer.
//!
//! Names and arguments are QEMU's (`qapi/*.json`); what a command does is documented there.

use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::answer::{
    AddFdInfo, BlockNode, BlockStats, CapabilityState, CpuInfo, Empty, KvmInfo, Machine, MigrationInfo, NameInfo,
    Schema, StatusInfo, UuidInfo, Version, YankInstance,
};

mod sealed {
    pub trait Sealed {}
}

/// Where QEMU runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Band {
    /// One after another, in QEMU's main loop.
    InBand,
    /// At once, past the queue, even while the main loop is stuck (when QEMU offers `oob`; else in-band).
    OutOfBand,
}

/// A QMP command. Sealed: [`Raw`] serves what has no type of its own.
pub trait Command: Serialize + Send + sealed::Sealed {
    /// What QEMU returns.
    type Return: DeserializeOwned;
    /// Where QEMU runs it.
    const BAND: Band;
    /// QEMU's name of it.
    fn name(&self) -> &str;
    /// The descriptor that goes with it, taken out.
    fn take_descriptor(&mut self) -> Option<OwnedFd> {
        None
    }
}

macro_rules! commands {
    ($($(#[$meta:meta])* $name:ident($word:literal, $band:ident) -> $ret:ty {
        $($(#[$fmeta:meta])* $field:ident: $ty:ty,)*
    })+) => {
        $(
            $(#[$meta])*
            #[doc = concat!("\n\nQMP: `", $word, "`.")]
            #[derive(Debug, Clone, Default, PartialEq, Serialize)]
            #[serde(rename_all = "kebab-case")]
            pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
            impl sealed::Sealed for $name {}
            impl Command for $name {
                type Return = $ret;
                const BAND: Band = Band::$band;
                fn name(&self) -> &str { $word }
            }
        )+
    };
}

commands! {
    /// Whether the guest runs, and if not why.
    QueryStatus("query-status", InBand) -> StatusInfo {}
    /// QEMU's version.
    QueryVersion("query-version", InBand) -> Version {}
    /// Whether KVM is there and in use.
    QueryKvm("query-kvm", InBand) -> KvmInfo {}
    /// The text of `-name`.
    QueryName("query-name", InBand) -> NameInfo {}
    /// The text of `-uuid`.
    QueryUuid("query-uuid", InBand) -> UuidInfo {}
    /// Machine types.
    QueryMachines("query-machines", InBand) -> Vec<Machine> {}
    /// Virtual CPUs and their threads, without stopping them.
    QueryCpusFast("query-cpus-fast", InBand) -> Vec<CpuInfo> {}
    /// Names of the commands and events that this QEMU has.
    QueryQmpSchema("query-qmp-schema", InBand) -> Schema {}
    /// All block nodes.
    QueryNamedBlockNodes("query-named-block-nodes", InBand) -> Vec<BlockNode> {
        /// Leave the chain of backing files out of each.
        flat: bool,
    }
    /// Counters of the block devices.
    QueryBlockstats("query-blockstats", InBand) -> Vec<BlockStats> {}

    /// Stops the guest's CPUs.
    Stop("stop", InBand) -> Empty {}
    /// Runs the guest's CPUs; nothing when they run.
    Cont("cont", InBand) -> Empty {}
    /// Presses the power button: the guest decides.
    SystemPowerdown("system_powerdown", InBand) -> Empty {}
    /// Resets the machine at once.
    SystemReset("system_reset", InBand) -> Empty {}
    /// Ends QEMU.
    Quit("quit", InBand) -> Empty {}

    /// Where the migration is.
    QueryMigrate("query-migrate", InBand) -> MigrationInfo {}
    /// What this QEMU's migration can do, and what is on.
    QueryMigrateCapabilities("query-migrate-capabilities", InBand) -> Vec<CapabilityState> {}
    /// Switches capabilities. All or none.
    MigrateSetCapabilities("migrate-set-capabilities", InBand) -> Empty {
        /// The switches.
        capabilities: Vec<CapabilityState>,
    }
    /// Current parameters.
    QueryMigrateParameters("query-migrate-parameters", InBand) -> Value {}
    /// Sets parameters; `None` leaves one as it is.
    MigrateSetParameters("migrate-set-parameters", InBand) -> Empty {
        /// Bytes a second; 0 is no limit.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_bandwidth: Option<u64>,
        /// Bytes a second after the switchover of a post-copy; 0 is no limit.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_postcopy_bandwidth: Option<u64>,
        /// Longest blackout aimed at, in ms.
        #[serde(skip_serializing_if = "Option::is_none")]
        downtime_limit: Option<u64>,
        /// First announcement after this, in ms.
        #[serde(skip_serializing_if = "Option::is_none")]
        announce_initial: Option<u64>,
        /// Longest pause between announcements, in ms.
        #[serde(skip_serializing_if = "Option::is_none")]
        announce_max: Option<u64>,
        /// How many announcements.
        #[serde(skip_serializing_if = "Option::is_none")]
        announce_rounds: Option<u64>,
        /// By how much the pause grows, in ms.
        #[serde(skip_serializing_if = "Option::is_none")]
        announce_step: Option<u64>,
        /// Channels of multifd.
        #[serde(skip_serializing_if = "Option::is_none")]
        multifd_channels: Option<u8>,
        /// Auto-converge: first throttle, in per cent.
        #[serde(skip_serializing_if = "Option::is_none")]
        cpu_throttle_initial: Option<u8>,
        /// Auto-converge: its growth, in per cent.
        #[serde(skip_serializing_if = "Option::is_none")]
        cpu_throttle_increment: Option<u8>,
        /// Auto-converge: its most, in per cent.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_cpu_throttle: Option<u8>,
        /// Id of the TLS credentials object; empty for none.
        #[serde(skip_serializing_if = "Option::is_none")]
        tls_creds: Option<String>,
        /// The name expected in the peer's certificate.
        #[serde(skip_serializing_if = "Option::is_none")]
        tls_hostname: Option<String>,
        /// Id of the authorisation object that the peer's name must pass.
        #[serde(skip_serializing_if = "Option::is_none")]
        tls_authz: Option<String>,
    }
    /// Starts to migrate to `uri`, in the background.
    Migrate("migrate", InBand) -> Empty {
        /// `unix:PATH` or `fd:NAME`. Never `exec:` under the sandbox, which would kill QEMU.
        uri: String,
        /// Goes on with a post-copy that was cut.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        resume: bool,
    }
    /// Opens the door for an incoming migration (`-incoming defer`).
    MigrateIncoming("migrate-incoming", InBand) -> Empty {
        /// `unix:PATH` or `fd:NAME`.
        uri: String,
        /// False keeps a QEMU whose load failed (QEMU 9.1 and newer); `None` is QEMU's default, to exit.
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_on_error: Option<bool>,
    }
    /// Gives the migration up. Too late, it is completed all the same: ask `query-migrate`.
    MigrateCancel("migrate_cancel", InBand) -> Empty {}
    /// Goes on from a pause at `state`.
    MigrateContinue("migrate-continue", InBand) -> Empty {
        /// The pause: `pre-switchover`.
        state: String,
    }
    /// Lets the destination run and pull its pages.
    MigrateStartPostcopy("migrate-start-postcopy", InBand) -> Empty {}
    /// Cuts a post-copy so that it can be recovered.
    MigratePause("migrate-pause", OutOfBand) -> Empty {}
    /// Opens a new door at the destination of a cut post-copy.
    MigrateRecover("migrate-recover", OutOfBand) -> Empty {
        /// As of `migrate-incoming`.
        uri: String,
    }
    /// Makes the guest's addresses known to the network.
    AnnounceSelf("announce-self", InBand) -> Empty {
        /// First after this, in ms.
        initial: u64,
        /// Longest pause, in ms.
        max: u64,
        /// How many.
        rounds: u64,
        /// Growth of the pause, in ms.
        step: u64,
    }
    /// What can be yanked now.
    QueryYank("query-yank", OutOfBand) -> Vec<YankInstance> {}
    /// Cuts connections that QEMU waits for.
    Yank("yank", OutOfBand) -> Empty {
        /// Which.
        instances: Vec<YankInstance>,
    }

    /// Asks the guest to let go of a device; `DEVICE_DELETED` says when it did.
    DeviceDel("device_del", InBand) -> Empty {
        /// The device's id.
        id: String,
    }
    /// Removes an object.
    ObjectDel("object-del", InBand) -> Empty {
        /// The object's id.
        id: String,
    }
    /// Plugs a network cable in or out.
    SetLink("set_link", InBand) -> Empty {
        /// Id of the device or of its back end.
        name: String,
        /// In or out.
        up: bool,
    }
    /// Forgets a descriptor given by [`GetFd`].
    CloseFd("closefd", InBand) -> Empty {
        /// Its name.
        fdname: String,
    }
    /// Forgets descriptors given by [`AddFd`].
    RemoveFd("remove-fd", InBand) -> Empty {
        /// The set.
        fdset_id: u64,
    }
}

/// Gives QEMU a descriptor under a name, for `fd:NAME`.
///
/// QMP: `getfd`.
#[derive(Debug, Serialize)]
pub struct GetFd {
    /// The name.
    pub fdname: String,
    /// The descriptor; closed here once sent.
    #[serde(skip)]
    pub descriptor: Option<OwnedFd>,
}

impl GetFd {
    /// The command that gives `descriptor` the name `fdname`.
    #[must_use]
    pub fn new(fdname: &str, descriptor: OwnedFd) -> Self {
        Self {
            fdname: fdname.to_owned(),
            descriptor: Some(descriptor),
        }
    }
}

impl sealed::Sealed for GetFd {}

impl Command for GetFd {
    type Return = Empty;
    const BAND: Band = Band::InBand;
    fn name(&self) -> &str {
        "getfd"
    }
    fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }
}

/// Gives QEMU a descriptor for a set, to be opened as `/dev/fdset/N`.
///
/// QMP: `add-fd`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddFd {
    /// The set.
    pub fdset_id: u64,
    /// The descriptor; closed here once sent.
    #[serde(skip)]
    pub descriptor: Option<OwnedFd>,
}

impl AddFd {
    /// The command that adds `descriptor` to set `fdset_id`.
    #[must_use]
    pub fn new(fdset_id: u64, descriptor: OwnedFd) -> Self {
        Self {
            fdset_id,
            descriptor: Some(descriptor),
        }
    }
}

impl sealed::Sealed for AddFd {}

impl Command for AddFd {
    type Return = AddFdInfo;
    const BAND: Band = Band::InBand;
    fn name(&self) -> &str {
        "add-fd"
    }
    fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }
}

/// A command that has no type of its own: `object-add`, `device_add`, `blockdev-add` take whatever their kind needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Raw {
    /// QEMU's name.
    pub name: String,
    /// The arguments: a JSON object.
    pub arguments: Value,
}

impl Raw {
    /// `name` with `arguments`.
    #[must_use]
    pub fn new(name: &str, arguments: Value) -> Self {
        Self {
            name: name.to_owned(),
            arguments,
        }
    }
}

impl Serialize for Raw {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.arguments.serialize(serializer)
    }
}

impl sealed::Sealed for Raw {}

impl Command for Raw {
    type Return = Value;
    const BAND: Band = Band::InBand;
    fn name(&self) -> &str {
        &self.name
    }
}

/// Leaves negotiation mode; the session's own.
#[derive(Debug, Serialize)]
pub(crate) struct QmpCapabilities {
    pub(crate) enable: Vec<&'static str>,
}

impl sealed::Sealed for QmpCapabilities {}

impl Command for QmpCapabilities {
    type Return = Empty;
    const BAND: Band = Band::InBand;
    fn name(&self) -> &str {
        "qmp_capabilities"
    }
}

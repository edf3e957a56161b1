//! What QEMU reports by itself (QEMU's `qapi/run-state.json`, `migration.json`, `block-core.json`, `qdev.json`).

use serde::Deserialize;
use serde_json::Value;

use crate::answer::{MigrationStatus, ShutdownCause};
use crate::open_enum::open_enum;

/// Something that QEMU reports, in QEMU's order.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// QEMU's wall clock when it happened, in microseconds since 1970. Two QEMUs on one host share this clock.
    pub at_us: u64,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// The guest's CPUs stopped.
    Stop,
    /// The guest's CPUs run.
    Resume,
    /// QEMU is shutting down.
    Shutdown {
        /// True when the guest asked for it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// The machine was reset.
    Reset {
        /// True when the guest asked for it.
        guest: bool,
    },
    /// The power button was pressed (`system_powerdown`).
    Powerdown,
    /// The guest reported a panic.
    GuestPanicked,
    /// The migration's status changed (capability `events`).
    Migration {
        /// Its new status.
        status: MigrationStatus,
    },
    /// A pass over the guest's memory began (capability `events`).
    MigrationPass {
        /// Number of the pass, from 1.
        pass: u64,
    },
    /// A block job went a step.
    BlockJob(BlockJob),
    /// A disk request failed.
    BlockIoError {
        /// The block node.
        node_name: String,
        /// `read` or `write`.
        operation: String,
        /// What QEMU did: `stop`, `report` or `ignore`.
        action: String,
        /// QEMU's words.
        reason: String,
    },
    /// The guest let go of a device.
    DeviceDeleted {
        /// Its id; empty when it had none.
        device: String,
    },
    /// Anything else.
    Other {
        /// QEMU's name of the event.
        name: String,
        /// Its data, as sent.
        data: Value,
    },
}

open_enum! {
    /// Which step a block job went.
    BlockJobStep {
        Completed = "BLOCK_JOB_COMPLETED",
        Cancelled = "BLOCK_JOB_CANCELLED",
        Error = "BLOCK_JOB_ERROR",
        Ready = "BLOCK_JOB_READY",
        Pending = "BLOCK_JOB_PENDING",
    }
}

/// Data of the `BLOCK_JOB_*` events.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct BlockJob {
    /// The step.
    #[serde(skip)]
    pub step: BlockJobStep,
    /// The job's id.
    #[serde(alias = "id")]
    pub device: String,
    /// `mirror`, `stream`, `commit`, `backup`.
    pub r#type: String,
    /// Size of the work, in bytes; 0 in steps that do not say.
    pub len: u64,
    /// Done so far, in bytes.
    pub offset: u64,
    /// What went wrong, with a `Completed` that failed.
    pub error: Option<String>,
}

/// QEMU's time of an event. Both parts are -1 when the host's clock failed.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    fn as_us(self) -> u64 {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        let microseconds = u64::try_from(self.microseconds).unwrap_or(0);
        seconds.saturating_mul(1_000_000).saturating_add(microseconds)
    }
}

impl Event {
    /// Events whose loss would leave a wrong picture of the VM: where it runs, whether it ended, how far a job came.
    #[must_use]
    pub fn is_essential(&self) -> bool {
        !matches!(
            self.kind,
            EventKind::Other { .. } | EventKind::BlockIoError { .. } | EventKind::Reset { .. }
        )
    }

    pub(crate) fn new(name: &str, data: Value, timestamp: Timestamp) -> Self {
        let text = |field: &str| data.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        let guest = data.get("guest").and_then(Value::as_bool).unwrap_or(false);
        let kind = match name {
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "SHUTDOWN" => EventKind::Shutdown {
                guest,
                reason: text("reason").as_str().into(),
            },
            "RESET" => EventKind::Reset { guest },
            "POWERDOWN" => EventKind::Powerdown,
            "GUEST_PANICKED" => EventKind::GuestPanicked,
            "MIGRATION" => EventKind::Migration {
                status: text("status").as_str().into(),
            },
            "MIGRATION_PASS" => EventKind::MigrationPass {
                pass: data.get("pass").and_then(Value::as_u64).unwrap_or(0),
            },
            "DEVICE_DELETED" => EventKind::DeviceDeleted { device: text("device") },
            "BLOCK_IO_ERROR" => EventKind::BlockIoError {
                node_name: text("node-name"),
                operation: text("operation"),
                action: text("action"),
                reason: text("reason"),
            },
            step if step.starts_with("BLOCK_JOB_") => {
                // A job event of an odd shape still says that the job went a step.
                let job = BlockJob::deserialize(&data).unwrap_or_default();
                EventKind::BlockJob(BlockJob {
                    step: step.into(),
                    ..job
                })
            }
            _ => EventKind::Other {
                name: name.to_owned(),
                data,
            },
        };
        Self {
            at_us: timestamp.as_us(),
            kind,
        }
    }
}

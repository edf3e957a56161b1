//! A migration that is held in its middle, for what may happen there.
//!
//! The middle is where the fault matrix has its column 3 (pre-copy): the link is slower than the guest writes, so the copy goes on
//! until the test lets it end; an event of the copy's progress tells that it is under way.

use crate::api::Api;
use crate::fixture::{Guest, Shared, Status};
use crate::load::Load;
use crate::traces::Traces;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// The host that has the VM, by number.
pub const FROM: u8 = 1;
/// The host that gets it.
pub const TO: u8 = 2;
/// So slow that the copy neither ends nor comes to its fourth round (from there on a guest that writes too fast is given a longer
/// and longer standstill, and requests would rightly be lost) before all of Godwit has been killed and started again, on a machine
/// as busy as may be: the first round alone is more than 64 MiB at 2 MB/s, the next is what the guest wrote meanwhile.
const LINK_MBIT_PER_S: u32 = 16;
const WRITTEN_MIB: u32 = 64;
const WRITES_MIB_PER_S: u32 = 64;
/// The copy is under way when this much is over.
const UNDER_WAY_BYTES: u64 = 2 << 20;
const COPY_LIMIT: Duration = Duration::from_secs(60);
/// After the fault the operation ends within this by itself, s.
const END_LIMIT_S: u32 = 90;

/// A migration in its middle, which does not end before it is let go; watched by a load.
#[derive(Debug)]
pub struct Moving {
    /// The guest.
    pub guest: Guest,
    /// The operation's id.
    pub operation: String,
    /// Checksum of its disk.
    pub written: String,
    /// What it said before.
    pub before: Status,
    load: Load,
}

impl Moving {
    /// A VM on [`FROM`], on its way to [`TO`].
    ///
    /// # Errors
    /// When the copy does not begin.
    pub fn begin(shared: &Shared) -> Result<Moving> {
        let guest = shared.create("moving", FROM)?;
        let written = guest.write_disk(8, 5)?;
        guest.write_memory(WRITTEN_MIB, WRITES_MIB_PER_S)?;
        shared.cluster.lab().host(FROM)?.shape(Some(LINK_MBIT_PER_S))?;
        let before = guest.status()?;
        let load = Load::start(&shared.cluster.lab().client_netns(), guest.ip, 50)?;
        let events = Api::of(&shared.cluster)?.events(None)?;
        let begun = shared
            .cluster
            .json(&["vm", "migrate", &guest.name, "--to", &format!("h{TO}"), "--no-wait"])?;
        let operation = begun["id"].as_str().context("the operation has no id")?.to_owned();
        let under_way = events.wait(COPY_LIMIT, |event| {
            let progress = &event.data["progress"];
            let what = event.data["what"].as_str().unwrap_or_default();
            let over = ["operation.succeeded", "operation.failed", "operation.cancelled"].contains(&what);
            let ended = over && event.data["operation"] == operation;
            let ours = event.kind == "progress" && event.data["operation"] == operation;
            ended || (ours && progress["bytes"].as_u64() > Some(UNDER_WAY_BYTES))
        })?;
        ensure!(
            under_way.kind == "progress",
            "the copy did not come to its middle: {}",
            under_way.data
        );
        Ok(Moving {
            guest,
            operation,
            written,
            before,
            load,
        })
    }

    /// What it has on host `n`.
    ///
    /// # Errors
    /// As [`Traces::of`].
    pub fn traces(&self, shared: &Shared, n: u8) -> Result<Traces> {
        Traces::of(shared.cluster.lab(), n, &self.guest.id)
    }

    /// The link is fast again and the guest writes no more: the copy may end.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn let_go(&self, shared: &Shared) -> Result<()> {
        shared.cluster.lab().host(FROM)?.shape(None)?;
        self.guest.write_memory(0, 0)
    }

    /// The operation, once it is over.
    ///
    /// # Errors
    /// When it does not end by itself.
    pub fn over(&self, shared: &Shared) -> Result<Value> {
        shared.ended(&self.operation, END_LIMIT_S)
    }

    /// The guest runs on host `n` and nowhere else, has lost nothing, and no request was lost but in a standstill of the whole copy.
    ///
    /// # Errors
    /// What is not so.
    pub fn holds(self, shared: &Shared, n: u8) -> Result<()> {
        shared.settled(&self.guest, n)?;
        self.guest.status()?.follows(&self.before)?;
        ensure!(
            self.guest.check_disk()? == self.written,
            "the disk has another checksum than before"
        );
        self.load.finish()?.holds(shared.stands_while_copied()?)
    }
}

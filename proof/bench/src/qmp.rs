//! The bench's own QMP client, as small as it can be: no part of Godwit that
//! could flatter Godwit is used to measure the others.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// Nothing that is waited for takes longer.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to one QEMU, which dials us: its connection is the event that it is up.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Waits for QEMU to connect and leaves capabilities negotiation.
    ///
    /// # Errors
    /// When it does not greet within two minutes.
    pub fn accept(listener: &UnixListener) -> Result<Qmp> {
        let fds = &mut [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        if rustix::event::poll(fds, Some(&limit)).context("poll")? == 0 {
            bail!("QEMU did not connect its QMP socket within 20 s");
        }
        let (stream, _) = listener.accept().context("accept QEMU's connection")?;
        stream.set_read_timeout(Some(LIMIT)).context("set a timeout")?;
        let mut qmp = Qmp {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
        };
        qmp.message().context("QEMU's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    /// When QEMU refuses it or is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let message = json!({ "execute": command, "arguments": arguments });
        // In one piece: QEMU acts on the closing brace, and after `quit` nobody reads the newline.
        let line = format!("{message}\n");
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("send {command}"))?;
        loop {
            let mut answer = self.message().with_context(|| format!("the answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("refused"));
            }
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for an event that `wanted` accepts; returns its time in ms of the wall clock.
    ///
    /// # Errors
    /// When it does not come within two minutes or QEMU is gone.
    pub fn wait(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Result<f64> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.message().with_context(|| format!("waiting for {name}"))?,
            };
            if event["event"] == name && wanted(&event["data"]) {
                let at = &event["timestamp"];
                let seconds = at["seconds"].as_f64().context("an event's time")?;
                return Ok(seconds * 1e3 + at["microseconds"].as_f64().context("an event's time")? / 1e3);
            }
        }
    }

    /// Waits until the outgoing migration has completed.
    ///
    /// # Errors
    /// When it fails.
    pub fn wait_completed(&mut self) -> Result<()> {
        self.wait("MIGRATION", |data| {
            data["status"] == "completed" || data["status"] == "failed"
        })?;
        let state = self.execute("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => Ok(()),
            other => bail!("the migration is {other:?}: {}", state["error-desc"]),
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("read from QEMU")? == 0 {
            bail!("QEMU closed its QMP connection");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}

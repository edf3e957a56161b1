//! Processes that outlive the agent are no part of its service: where systemd runs, each gets a scope of its own, so that stopping or
//! accounting the agent's service does not mean them.
//!
//! Source: `org.freedesktop.systemd1(5)`, `StartTransientUnit`; asked for by `busctl`, which is there wherever systemd is.

use std::{io, path::Path, process::Stdio, time::Duration};

use driver::Process;
use tokio::process::Command;

/// There when systemd is the system's manager (`sd_booted(3)`).
const BOOTED: &str = "/run/systemd/system";

/// The slice in which virtual machines are, whoever runs them.
const SLICE: &str = "machine.slice";

/// How long systemd may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Moves a process that was just started into a scope named after `what`, a text of letters, digits and `-`. Nothing is waited for:
/// until it is done, or where it cannot be, the process is the service's, whose unit leaves it alone (`KillMode=process`).
pub fn own_scope(process: Process, what: String) {
    if !Path::new(BOOTED).exists() {
        return;
    }
    tokio::spawn(async move {
        if let Err(error) = ask(process, &what).await {
            tracing::warn!(%error, process = process.pid, what, "no scope of its own: the process stays in the agent's service");
        }
    });
}

async fn ask(process: Process, what: &str) -> io::Result<()> {
    let mut command = Command::new("busctl");
    command
        .args(request(process, what))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(ANSWER_MAX, command.output()).await??;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}

/// The pid makes the name one that no earlier process of the same VM can still have.
fn request(process: Process, what: &str) -> Vec<String> {
    let name = format!("godwit-{what}-{}.scope", process.pid);
    let pid = process.pid.to_string();
    let manager = [
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    ];
    let call = ["StartTransientUnit", "ssa(sv)a(sa(sv))", &name, "fail"];
    let properties = [
        "3",
        "PIDs",
        "au",
        "1",
        &pid,
        "Slice",
        "s",
        SLICE,
        "CollectMode",
        "s",
        "inactive-or-failed",
    ];
    let words = ["--system", "--quiet", "call"]
        .into_iter()
        .chain(manager)
        .chain(call)
        .chain(properties);
    // No auxiliary units.
    words.chain(["0"]).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_words_that_its_signature_wants() {
        let words = request(Process { pid: 7, start_ticks: 1 }, "vm-1");
        let at = words.iter().position(|word| word == "ssa(sv)a(sa(sv))").unwrap();
        assert_eq!(&words[at + 1..at + 4], ["godwit-vm-1-7.scope", "fail", "3"]);
        assert_eq!(words[at + 4..at + 8].join(" "), "PIDs au 1 7");
        assert_eq!(words.last().unwrap(), "0");
    }
}

//! The command line: words, streams, tokens, servers, interruptions.

use crate::SAID_LIMIT;
use anyhow::{Context, Result, ensure};
use e2e::cluster::Ended;
use e2e::fixture::Shared;
use e2e::terminal::Terminal;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;

pub(crate) fn a_command_line_that_makes_no_sense_is_refused(shared: &mut Shared) -> Result<()> {
    let garbled = ["vm".into(), "show".into(), OsString::from_vec(vec![b'a', 0xff, b'b'])];
    Ended::of(&mut shared.cluster.command(&garbled))?.refused(2)?;
    for words in [
        &["vm", "create", "../x", "--template", "micro"][..],
        &["vm", "create", "x", "--template", "micro", "--vcpus", "0"],
        &["vm", "create", "x", "--template", "micro", "--memory", "1e400"],
        &["vm", "start", "--", "-drive"],
        &["vm", "frobnicate"],
        &["op", "show", "1"],
        &["template", "import", "x"],
    ] {
        let ended = shared.cluster.attempt(words)?;
        ensure!(
            ended.code == Some(2),
            "`{}` ends with {:?}: {}",
            words.join(" "),
            ended.code,
            ended.err
        );
        ensure!(
            ended.err.starts_with("error: "),
            "`{}` says {}",
            words.join(" "),
            ended.err
        );
    }
    Ok(())
}

pub(crate) fn a_closed_output_ends_a_command_quietly(shared: &mut Shared) -> Result<()> {
    for words in [
        &["vm", "list"][..],
        &["host", "list", "-o", "json"],
        &["events"],
        &["completion", "bash"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        drop(reader);
        let ended = Ended::of(shared.cluster.command(words).stdout(writer))?;
        ensure!(ended.err.is_empty(), "`{}` says {}", words.join(" "), ended.err);
        ensure!(
            ended.code == Some(0),
            "`{}` ends with {:?}",
            words.join(" "),
            ended.code
        );
    }
    Ok(())
}

pub(crate) fn a_token_that_others_can_read_is_not_used(shared: &mut Shared) -> Result<()> {
    let open = shared.cluster.lab().dir().join("open.token");
    fs::copy(shared.cluster.state().join("admin.token"), &open).context("cannot copy the token")?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).context("cannot open a file to others")?;
    let path = open.to_string_lossy();
    let said = shared
        .cluster
        .attempt(&["--token-file", &path, "vm", "list"])?
        .refused(1)?;
    ensure!(said.contains("open.token"), "it does not name the file: {said}");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o600)).context("cannot close a file to others")?;
    shared.cluster.cli(&["--token-file", &path, "vm", "list"])?;
    fs::write(&open, "gw1_short\n").context("cannot write a token")?;
    shared
        .cluster
        .attempt(&["--token-file", &path, "vm", "list"])?
        .refused(1)?;
    shared
        .cluster
        .attempt(&["--token-file", "/no/such", "vm", "list"])?
        .refused(1)
        .map(drop)
}

pub(crate) fn a_server_that_is_not_there_or_not_ours_is_told(shared: &mut Shared) -> Result<()> {
    let nobody = format!("https://{}:1", shared.cluster.api_address().ip());
    shared
        .cluster
        .attempt(&["--server", &nobody, "vm", "list"])?
        .refused(3)?;
    // The agents' port is TLS of the same cluster, and not for people.
    let other = format!("https://{}", shared.cluster.agents_address());
    shared
        .cluster
        .attempt(&["--server", &other, "vm", "list"])?
        .refused(3)?;
    shared
        .cluster
        .attempt(&["--server", "http://localhost:1", "vm", "list"])?
        .refused(2)?;
    Ok(())
}

pub(crate) fn an_interrupted_command_says_how_to_follow_what_goes_on(shared: &mut Shared) -> Result<()> {
    shared.create("long", 1)?;
    // A guest that stands does not hear its power button.
    shared.cluster.json(&["vm", "pause", "long", "--wait"])?;
    let mut terminal = Terminal::start(&mut shared.cluster.command(&["vm", "stop", "long", "--grace", "8"]))?;
    terminal.wait_for("stop-vm", SAID_LIMIT)?;
    let pid = i32::try_from(terminal.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("no process id")?;
    kill_process(pid, Signal::INT).context("cannot interrupt it")?;
    terminal.wait_for("godwit op wait ", SAID_LIMIT)?;
    let operation = terminal.wait_for("`", SAID_LIMIT)?;
    terminal.wait_for("godwit op cancel", SAID_LIMIT)?;
    let status = terminal.wait_end(SAID_LIMIT)?;
    ensure!(status.code() == Some(130), "it ended with {status}");
    let ended = shared.ended(operation.trim(), 60)?;
    ensure!(
        ended["state"]["state"] == "succeeded",
        "the operation did not go on: {ended}"
    );
    ensure!(shared.cluster.vm("long")?.state == "inactive", "the VM is not off");
    Ok(())
}

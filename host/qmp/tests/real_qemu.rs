//! The session against the real program. Needs `qemu-system-x86_64` in the path, or `GODWIT_QEMU` naming one.
#![allow(clippy::unwrap_used)] // Helpers of tests.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use qmp::{CloseReason, CommandError, ConnectError, EventKind, GetFd, Limits, Session, ShutdownCause};
use tokio::process::{Child, Command};

fn program() -> PathBuf {
    std::env::var_os("GODWIT_QEMU").map_or_else(|| "qemu-system-x86_64".into(), PathBuf::from)
}

/// A QEMU with no machine, its QMP on a socket that it already listens on when this returns.
fn start(directory: &Path) -> (Child, PathBuf) {
    let socket = directory.join("qmp.sock");
    // We listen and QEMU inherits the listener: nothing has to wait for the socket to appear.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let inherited = rustix::io::fcntl_dupfd_cloexec(&listener, 100).unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    use std::os::fd::AsRawFd;
    let child = Command::new(program())
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
        ])
        .arg("-chardev")
        .arg(format!("socket,id=qmp,fd={},server=on,wait=off", inherited.as_raw_fd()))
        .args(["-mon", "chardev=qmp,mode=control"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("QEMU is installed: see the README");
    (child, socket)
}

#[tokio::test]
// tidy: long because one QEMU is asked every query in turn
async fn every_query_is_answered_by_the_real_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, socket) = start(directory.path());
    let (session, mut events) = Session::connect(&socket, Limits::default()).await.unwrap();

    let version = session.execute(qmp::QueryVersion {}).await.unwrap();
    assert_eq!(&version, session.version());
    assert!(
        version.qemu
            >= qmp::VersionTriple {
                major: 7,
                minor: 2,
                micro: 0
            },
        "{}",
        version.qemu
    );
    assert_eq!(
        session.execute(qmp::QueryStatus {}).await.unwrap().status,
        qmp::RunState::Prelaunch
    );
    assert!(
        session
            .execute(qmp::QueryMachines {})
            .await
            .unwrap()
            .iter()
            .any(|m| m.alias.as_deref() == Some("q35"))
    );
    let capabilities = session.execute(qmp::QueryMigrateCapabilities {}).await.unwrap();
    for wanted in [
        "return-path",
        "events",
        "pause-before-switchover",
        "late-block-activate",
    ] {
        assert!(capabilities.iter().any(|c| c.capability == wanted), "{wanted}");
    }
    let schema = session.execute(qmp::QueryQmpSchema {}).await.unwrap();
    for command in [
        "yank",
        "migrate-recover",
        "getfd",
        "announce-self",
        "migrate-continue",
        "query-cpus-fast",
    ] {
        assert!(schema.has_command(command), "{command}");
    }
    assert!(schema.has_event("MIGRATION_PASS") && !schema.has_event("yank") && !schema.has_command("STOP"));
    session.execute(qmp::QueryKvm {}).await.unwrap();
    session.execute(qmp::QueryCpusFast {}).await.unwrap();
    session.execute(qmp::QueryNamedBlockNodes { flat: true }).await.unwrap();
    session.execute(qmp::QueryBlockstats {}).await.unwrap();
    session.execute(qmp::QueryMigrateParameters {}).await.unwrap();
    assert_eq!(
        session.execute(qmp::QueryMigrate {}).await.unwrap(),
        qmp::MigrationInfo::default()
    );
    assert!(
        session
            .execute(qmp::QueryYank {})
            .await
            .unwrap()
            .iter()
            .any(|i| matches!(i, qmp::YankInstance::Chardev { .. }))
    );

    session
        .execute(qmp::MigrateSetParameters {
            max_bandwidth: Some(0),
            downtime_limit: Some(20),
            ..Default::default()
        })
        .await
        .unwrap();
    let refused = session.execute(qmp::Raw::new("no-such", serde_json::json!({}))).await;
    assert!(
        matches!(&refused, Err(CommandError::Refused { class, .. }) if class == "CommandNotFound"),
        "{refused:?}"
    );

    let occupied = Limits {
        greeting_deadline: Duration::from_millis(50),
        ..Limits::default()
    };
    let second = Session::connect(&socket, occupied).await;
    assert!(
        matches!(second, Err(ConnectError::NoGreeting(_))),
        "one client at a time: {second:?}"
    );

    session.execute(qmp::Quit {}).await.unwrap();
    let shutdown = events.recv().await.expect("told");
    assert_eq!(
        shutdown.kind,
        EventKind::Shutdown {
            guest: false,
            reason: ShutdownCause::HostQmpQuit
        }
    );
    assert!(shutdown.at_us > 1_600_000_000_000_000);
    assert_eq!(session.closed().await, CloseReason::PeerClosed);
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test]
async fn a_descriptor_reaches_the_real_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, socket) = start(directory.path());
    let (session, _events) = Session::connect(&socket, Limits::default()).await.unwrap();
    let path = directory.path().join("given");
    std::fs::write(&path, "x").unwrap();
    let give = || std::os::fd::OwnedFd::from(std::fs::File::open(&path).unwrap());

    let (one, two, three) = tokio::join!(
        session.execute(GetFd::new("one", give())),
        session.execute(GetFd::new("two", give())),
        session.execute(qmp::AddFd::new(7, give())),
    );
    one.unwrap();
    two.unwrap();
    assert_eq!(three.unwrap().fdset_id, 7);
    let pid = child.id().unwrap();
    let held = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|target| target == path))
        .count();
    assert_eq!(held, 3);
    session.execute(qmp::CloseFd { fdname: "two".into() }).await.unwrap();
    let gone = session.execute(qmp::CloseFd { fdname: "two".into() }).await;
    assert!(gone.unwrap_err().is_refusal());
    session.execute(qmp::Quit {}).await.unwrap();
    child.wait().await.unwrap();
}

#[tokio::test]
async fn the_death_of_the_real_qemu_ends_the_session() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, socket) = start(directory.path());
    let (session, _events) = Session::connect(&socket, Limits::default()).await.unwrap();
    child.start_kill().unwrap();
    assert_eq!(session.closed().await, CloseReason::PeerClosed);
    child.wait().await.unwrap();
}

//! A VM's life on one host, on the real QEMU.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{Host, Shared, assert_counts, drain, given, installed, launch, read_to, ticks, user};
use driver::{Action, Condition, Happened, Mode, Process};
use model::layout::Family;
use qemu::{AdoptError, Given, SpawnError};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

#[tokio::test]
async fn a_guest_runs_stands_resets_and_powers_itself_off_on_both_machines() {
    let (qemu, capabilities) = installed().await;
    for family in [Family::Q35, Family::Pc] {
        let shared = Shared::new(&capabilities, family);
        let mut host = Host::start(&qemu, &shared, Mode::Boot).await;
        let mut serial = host.serial().await;
        assert!(
            drain(&mut serial).await.is_empty(),
            "it stands at its first instruction"
        );
        host.run().await;
        assert_counts(&ticks(&mut serial, 200).await);

        host.act(Action::Stand);
        let told = host.until(|h| matches!(h, Happened::Standing { .. })).await;
        assert!(matches!(told.last(), Some(Happened::Standing { settled: true, at_ms }) if *at_ms > 1_600_000_000_000));
        let before = drain(&mut serial).await;
        assert!(drain(&mut serial).await.is_empty(), "it stands");
        host.act(Action::Stand);
        assert!(
            matches!(host.next().await, Happened::Standing { settled: true, .. }),
            "idempotent"
        );

        host.run().await;
        host.act(Action::Run);
        assert!(matches!(host.next().await, Happened::Running { .. }), "idempotent");
        let after = ticks(&mut serial, 50).await;
        assert_counts(&before.last().copied().into_iter().chain(after).collect::<Vec<_>>());

        host.act(Action::PowerButton);
        host.act(Action::Announce);
        host.act(Action::Reset);
        assert_eq!(host.next().await, Happened::Reset);
        read_to(&mut serial, 0).await; // It boots again.

        serial.write_all(b"q").await.unwrap();
        let told = host.until(|h| matches!(h, Happened::Died { .. })).await;
        assert!(told.contains(&Happened::PoweredOff), "{told:?}");
        assert!(
            matches!(told.last(), Some(Happened::Died { detail }) if detail == "QEMU ended with status 0"),
            "{told:?}"
        );
        assert!(host.vm().next().await.is_none());
    }
}

#[tokio::test]
async fn the_process_has_no_privileges_and_no_way_into_its_own_directory() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let host = Host::start(&qemu, &shared, Mode::Boot).await;
    let pid = host.handle.process().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("no {name}"));
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let user = user().to_string();
    assert_eq!(field("Uid:"), vec![user.clone(); 4]);
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Seccomp:"), ["2"], "sandboxed");
    if rustix::process::geteuid().is_root() {
        assert_eq!(field("Gid:"), vec![user; 4]);
        assert!(field("Groups:").is_empty());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(set), ["0000000000000000"], "{set}");
        }
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(3)
        .unwrap()
        .to_owned();
    assert_eq!(session, pid.to_string(), "a session of its own");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&host.run_dir()), 0o700);
    assert_eq!(mode(&host.run_dir().join("qmp.sock")), 0o600);
    assert_eq!(mode(&host.run_dir().join("serial.sock")), 0o600);
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(
        !String::from_utf8_lossy(&environment).contains("HOME="),
        "nothing of ours"
    );
    let run_dir = host.run_dir();
    host.end().await;
    assert!(
        !run_dir.exists() && !Path::new(&format!("/proc/{pid}")).exists(),
        "nothing stays, no zombie either"
    );
}

#[tokio::test]
async fn a_killed_process_is_told_dead_once_and_last() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut host = Host::start(&qemu, &shared, Mode::Boot).await;
    host.run().await;
    let handle = host.handle.clone();
    handle.act(Action::Kill).unwrap();
    let told = host.until(|h| matches!(h, Happened::Died { .. })).await;
    assert!(
        matches!(told.last(), Some(Happened::Died { detail }) if detail.starts_with("QEMU was killed by signal 9"))
    );
    assert!(host.vm().next().await.is_none());
    handle.act(Action::Kill).expect("idempotent");
    assert_eq!(handle.act(Action::Run), Err(qemu::ActError::Dead));
}

#[tokio::test]
async fn a_guest_outlives_its_agent_and_is_found_again() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut host = Host::start(&qemu, &shared, Mode::Boot).await;
    host.run().await;
    let mut serial = host.serial().await;
    let process = host.handle.process();
    let record = host.run_dir().join("process.json");
    assert_eq!(
        serde_json::from_slice::<Process>(&std::fs::read(&record).unwrap()).unwrap(),
        process
    );
    assert_eq!(host.restart_agent(&shared).await, Condition::Running);
    assert_eq!(host.handle.process(), process);

    // Killed between the start and the record.
    std::fs::remove_file(&record).unwrap();
    assert_eq!(host.restart_agent(&shared).await, Condition::Running);
    assert_eq!(host.handle.process(), process);
    assert_counts(&ticks(&mut serial, 100).await);
    host.act(Action::Stand);
    host.until(|h| matches!(h, Happened::Standing { settled: true, .. }))
        .await;
    assert_eq!(host.restart_agent(&shared).await, Condition::Standing);

    // The pid is another's by now.
    let other = Process {
        start_ticks: process.start_ticks + 1,
        ..process
    };
    std::fs::write(&record, serde_json::to_vec(&other).unwrap()).unwrap();
    assert!(matches!(
        qemu::Vm::adopt(shared.definition.vm, &host.run_dir()).await,
        Err(AdoptError::Gone)
    ));
    std::fs::write(&record, serde_json::to_vec(&process).unwrap()).unwrap();
    host.act(Action::Kill);
    host.until(|h| matches!(h, Happened::Died { .. })).await;
    assert!(matches!(
        qemu::Vm::adopt(shared.definition.vm, &host.run_dir()).await,
        Err(AdoptError::Gone)
    ));
}

#[tokio::test]
async fn another_vms_process_is_never_taken_for_ours() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut host = Host::start(&qemu, &shared, Mode::Boot).await;
    let run_dir = host.run_dir();
    host.let_go();
    let wrong = qemu::Vm::adopt(model::VmId(uuid::Uuid::now_v7()), &run_dir).await;
    assert!(matches!(wrong, Err(AdoptError::Deaf { .. })), "{wrong:?}");
    assert_eq!(host.restart_agent(&shared).await, Condition::Standing);
    host.end().await;
}

#[tokio::test]
async fn what_cannot_be_built_is_refused_with_its_reason_and_leaves_no_process() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let directory = tempfile::tempdir().unwrap();
    let run_dir = directory.path().join("run");
    let spawn = |change: fn(&mut driver::Launch)| {
        let mut launch = launch(&shared, Mode::Boot, &run_dir);
        change(&mut launch);
        qemu.spawn(launch, given(&shared, vec![]))
    };
    let unknown = spawn(|launch| launch.definition.layout.machine = "pc-q35-99.0".into())
        .await
        .unwrap_err();
    assert!(
        unknown.to_string().contains("has no machine type \"pc-q35-99.0\""),
        "{unknown}"
    );
    let said = spawn(|launch| launch.definition.layout.cpu = "NoSuchCpu".into())
        .await
        .unwrap_err();
    assert!(
        matches!(&said, SpawnError::Ended { obituary } if obituary.contains("NoSuchCpu")),
        "{said}"
    );
    let injected = spawn(|launch| launch.definition.layout.cpu = "qemu64 -monitor stdio".into())
        .await
        .unwrap_err();
    assert!(matches!(injected, SpawnError::Definition(_)), "{injected}");
    let newer = spawn(|launch| launch.definition.layout.version = 3).await.unwrap_err();
    assert!(format!("{:?}", newer).contains("Version(3)"), "{newer}");
    let fewer = qemu.spawn(launch(&shared, Mode::Boot, &run_dir), Given::default());
    let fewer = fewer.await.unwrap_err();
    assert_eq!(fewer.to_string(), "0 volumes were given for 1 in the definition");
    let adopted = qemu::Vm::adopt(shared.definition.vm, &run_dir).await;
    assert!(matches!(adopted, Err(AdoptError::Gone)), "{adopted:?}");

    let missing = qemu::Qemu::new(qemu::Program::at("/nonexistent/qemu"), capabilities.clone());
    let start = missing
        .spawn(launch(&shared, Mode::Boot, &run_dir), given(&shared, vec![]))
        .await
        .unwrap_err();
    assert!(matches!(start, SpawnError::Start { .. }), "{start}");
}

#[tokio::test]
async fn two_processes_do_not_write_one_disk() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let host = Host::start(&qemu, &shared, Mode::Boot).await;
    let directory = tempfile::tempdir().unwrap();
    let second = qemu
        .spawn(
            launch(&shared, Mode::Boot, &directory.path().join("run")),
            given(&shared, vec![]),
        )
        .await
        .unwrap_err();
    assert!(
        matches!(&second, SpawnError::Ended { obituary } if obituary.contains("lock")),
        "{second}"
    );
    host.end().await;
}

#[tokio::test]
async fn a_qemu_that_hangs_dies_all_the_same() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut host = Host::start(&qemu, &shared, Mode::Boot).await;
    host.run().await;
    let pid = rustix::process::Pid::from_raw(host.handle.process().pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    host.act(Action::Stand); // Not answered, now or ever.
    host.act(Action::Kill);
    let told = host.until(|h| matches!(h, Happened::Died { .. })).await;
    assert!(
        !told
            .iter()
            .any(|h| matches!(h, Happened::Standing { settled: true, .. })),
        "{told:?}"
    );
}

/// Stands between the agent and QEMU's monitor, so that the test can cut them apart.
fn relay_monitor(listener: &std::os::unix::net::UnixListener, real: PathBuf) -> JoinHandle<()> {
    let listener = listener.try_clone().unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    tokio::spawn(async move {
        let (mut agent, _) = listener.accept().await.unwrap();
        let mut qemu = UnixStream::connect(real).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut agent, &mut qemu).await;
    })
}

#[tokio::test]
async fn a_monitor_that_was_lost_is_got_back_and_what_changed_meanwhile_is_told() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut host = Host::start(&qemu, &shared, Mode::Boot).await;
    host.run().await;
    let (socket, real) = (host.run_dir().join("qmp.sock"), host.run_dir().join("real.sock"));
    std::fs::rename(&socket, &real).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let relay = relay_monitor(&listener, real.clone());
    assert_eq!(host.restart_agent(&shared).await, Condition::Running);

    relay.abort();
    let (other, _events) = qmp::Session::connect(&real, qmp::Limits::default()).await.unwrap();
    host.act(Action::Reset);
    let refused = host.next().await;
    assert!(
        matches!(refused, Happened::Refused { action: "reset", .. }),
        "{refused:?}"
    );
    other.execute(qmp::Stop {}).await.unwrap();
    drop((other, _events));
    let _relay = relay_monitor(&listener, real);
    let told = host.next().await;
    assert!(matches!(told, Happened::Standing { settled: true, .. }), "{told:?}");
    host.run().await;
    host.end().await;
}

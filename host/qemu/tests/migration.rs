//! A guest that moves between two real QEMUs, and what is told when that fails.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod common;

use common::{Host, Shared, Stream, WHILE, assert_counts, drain, fast, installed, other, reading_while, slow, ticks};
use driver::{Action, Condition, CopyLimits, Happened, INCOMING_SOCKET, Mode};
use model::layout::Family;
use qemu::{Capabilities, Qemu};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// A guest that runs on A, and a B that listens.
async fn pair(a: &Qemu, b: &Qemu, shared: &Shared) -> (Host, Host, Stream) {
    let mut source = Host::start(a, shared, Mode::Boot).await;
    source.run().await;
    let destination = listening(b, shared).await;
    let stream = Stream::between(&source, &destination);
    (source, destination, stream)
}

async fn listening(qemu: &Qemu, shared: &Shared) -> Host {
    let mut destination = Host::start(qemu, shared, Mode::Wait).await;
    destination.act(Action::Listen);
    assert_eq!(destination.next().await, Happened::Listening);
    destination
}

fn is_standing(happened: &Happened) -> bool {
    matches!(happened, Happened::Standing { .. })
}

fn copied(happened: &Happened) -> bool {
    matches!(happened, Happened::Copied { .. })
}

fn copy_failed(happened: &Happened) -> bool {
    matches!(happened, Happened::CopyFailed { .. })
}

/// Moves the guest from `a` to `b`; not a tick is lost, and B does not run before it is told to.
async fn moves(a: &Qemu, b: &Qemu, shared: &Shared) {
    let (mut source, mut destination, _stream) = pair(a, b, shared).await;
    let mut from = source.serial().await;
    let mut to = destination.serial().await;
    ticks(&mut from, 50).await;
    source.act(Action::Copy(fast()));
    let (mut told, mut before) = reading_while(&mut from, source.until(copied)).await;
    assert!(
        matches!(told.pop(), Some(Happened::Copied { cost }) if cost.bytes > 100_000),
        "what it cost"
    );
    assert!(told.iter().any(is_standing));
    assert_eq!(destination.next().await, Happened::Loaded);
    before.extend(drain(&mut from).await);
    assert!(drain(&mut to).await.is_empty(), "it waits for the word");
    assert!(destination.tells_within(WHILE).await.is_empty());
    destination.run().await;
    let after = ticks(&mut to, 100).await;
    before.extend(after);
    assert_counts(&before);
    source.end().await;
    assert_counts(&ticks(&mut to, 100).await);
    destination.end().await;
}

#[tokio::test]
async fn a_guest_moves_and_not_a_tick_is_lost() {
    let (qemu, capabilities) = installed().await;
    for family in [Family::Q35, Family::Pc] {
        moves(&qemu, &qemu, &Shared::new(&capabilities, family)).await;
    }
}

#[tokio::test]
async fn a_guest_moves_between_versions_in_both_directions() {
    let Some((older, _)) = other("a guest moves between versions").await else {
        return;
    };
    let (newer, capabilities): (Qemu, Capabilities) = installed().await;
    for (family, machine) in [(Family::Q35, "pc-q35-7.2"), (Family::Pc, "pc-i440fx-7.2")] {
        for (a, b) in [(&older, &newer), (&newer, &older)] {
            moves(a, b, &Shared::with_machine(&capabilities, family, Some(machine))).await;
        }
    }
}

#[tokio::test]
async fn a_guest_that_was_told_to_stand_is_settled_and_rounds_are_told() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let (mut source, mut destination, _stream) = pair(&qemu, &qemu, &shared).await;
    // Some 150 kB of marks for empty pages, then 64 kB that the guest writes again and again: it never fits the blackout.
    source.act(Action::Copy(CopyLimits {
        bytes_per_s_max: Some(300_000),
        downtime_max: model::Millis(1),
    }));
    let told = source
        .until(|h| matches!(h, Happened::Copying(state) if state.round >= 2))
        .await;
    let Some(Happened::Copying(state)) = told.last() else {
        panic!("{told:?}")
    };
    assert!(
        state.bytes > 0 && state.ended.is_some_and(|round| round.number == 1),
        "{state:?}"
    );
    source.act(Action::Stand);
    let told = source.until(is_standing).await;
    assert!(
        matches!(told.last(), Some(Happened::Standing { settled: true, .. })),
        "{told:?}"
    );
    source.until(copied).await;
    assert_eq!(destination.next().await, Happened::Loaded);
    destination.run().await;
    source.end().await;
    destination.end().await;
}

#[tokio::test]
async fn a_guest_that_stands_by_order_stays_so_when_the_stream_is_cut() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let (mut source, mut destination, stream) = pair(&qemu, &qemu, &shared).await;
    source.act(Action::Copy(slow()));
    source
        .until(|h| matches!(h, Happened::Copying(state) if state.bytes > 0))
        .await;
    source.act(Action::Stand);
    let told = source.until(is_standing).await;
    assert!(
        matches!(told.last(), Some(Happened::Standing { settled: true, .. })),
        "{told:?}"
    );
    stream.cut();
    let told = source.until(copy_failed).await;
    assert!(!told.iter().any(|h| matches!(h, Happened::Running { .. })), "{told:?}");
    assert!(
        source.tells_within(WHILE).await.is_empty(),
        "it does not run by itself, ever"
    );
    let told = destination
        .until(|h| matches!(h, Happened::LoadFailed { .. } | Happened::Died { .. }))
        .await;
    assert!(!told.contains(&Happened::Loaded));

    // B is dead for certain, so A may run again; and move again.
    destination.end().await;
    std::fs::remove_file(source.run_dir().join(driver::OUTGOING_SOCKET)).unwrap();
    let mut serial = source.serial().await;
    source.run().await;
    assert_counts(&ticks(&mut serial, 50).await);
    let mut again = listening(&qemu, &shared).await;
    let _stream = Stream::between(&source, &again);
    source.act(Action::Copy(fast()));
    source.until(copied).await;
    assert_eq!(again.next().await, Happened::Loaded);
    again.end().await;
    source.end().await;
}

#[tokio::test]
async fn a_source_whose_destination_voids_after_the_copy_runs_again() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let (mut source, destination, _stream) = pair(&qemu, &qemu, &shared).await;
    source.act(Action::Copy(fast()));
    source.until(copied).await;
    destination.end().await;
    let mut serial = source.serial().await;
    source.run().await;
    assert_counts(&ticks(&mut serial, 50).await);
    source.end().await;
}

#[tokio::test]
async fn a_cancelled_copy_leaves_the_guest_running() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let (mut source, destination, _stream) = pair(&qemu, &qemu, &shared).await;
    let mut serial = source.serial().await;
    source.act(Action::Copy(slow()));
    source.until(|h| matches!(h, Happened::Copying(_))).await;
    source.act(Action::CancelCopy);
    let told = source.until(copy_failed).await;
    assert!(
        matches!(told.last(), Some(Happened::CopyFailed { reason }) if reason.contains("cancelled")),
        "{told:?}"
    );
    assert!(!told.iter().any(is_standing));
    assert_counts(&ticks(&mut serial, 200).await);
    source.act(Action::CancelCopy);
    assert!(copy_failed(&source.next().await), "done when there is none");
    destination.end().await;
    source.end().await;
}

#[tokio::test]
async fn what_a_guest_read_is_told_but_not_while_it_is_moved() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let (mut source, destination, _stream) = pair(&qemu, &qemu, &shared).await;
    assert!(source.handle.disk_figures().await.is_some());
    assert_eq!(destination.handle.disk_figures().await, None, "it waits for its state");
    source.act(Action::Copy(slow()));
    source.until(|h| matches!(h, Happened::Copying(_))).await;
    assert_eq!(source.handle.disk_figures().await, None, "QEMU is not asked");
    source.act(Action::CancelCopy);
    source.until(copy_failed).await;
    assert!(source.handle.disk_figures().await.is_some());
    destination.end().await;
    source.end().await;
}

#[tokio::test]
async fn a_copy_without_a_tunnel_fails_at_once() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut source = Host::start(&qemu, &shared, Mode::Boot).await;
    source.act(Action::Attend);
    assert!(copy_failed(&source.next().await), "none was begun");
    source.act(Action::Copy(fast()));
    let told = source.next().await;
    assert!(
        matches!(&told, Happened::CopyFailed { reason } if reason.contains("no tunnel")),
        "{told:?}"
    );
    source.end().await;
}

#[tokio::test]
async fn a_restarted_agent_attends_to_the_copy_that_is_under_way() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let (mut source, mut destination, _stream) = pair(&qemu, &qemu, &shared).await;
    source.act(Action::Copy(CopyLimits {
        bytes_per_s_max: Some(100_000),
        ..fast()
    }));
    source
        .until(|h| matches!(h, Happened::Copying(state) if state.bytes > 0))
        .await;
    assert_eq!(source.restart_agent(&shared).await, Condition::Running);
    assert_eq!(destination.restart_agent(&shared).await, Condition::Loading);
    source.act(Action::Attend);
    source.until(|h| matches!(h, Happened::Copying(_))).await;
    source.act(Action::Stand);
    let told = source.until(copied).await;
    assert!(
        told.iter()
            .any(|h| matches!(h, Happened::Standing { settled: true, .. })),
        "{told:?}"
    );
    assert_eq!(destination.next().await, Happened::Loaded);
    source.act(Action::Attend);
    assert!(copied(&source.next().await), "told again to who asks again");
    assert_eq!(source.restart_agent(&shared).await, Condition::Sent);
    source.end().await;
    destination.run().await;
    destination.end().await;
}

#[tokio::test]
async fn a_destination_does_not_run_before_its_state_is_here() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut destination = listening(&qemu, &shared).await;
    destination.act(Action::Run);
    let told = destination.next().await;
    assert!(matches!(told, Happened::Refused { action: "run", .. }), "{told:?}");
    destination.end().await;
}

#[tokio::test]
async fn a_stream_of_garbage_is_a_failed_load() {
    let (qemu, capabilities) = installed().await;
    let shared = Shared::new(&capabilities, Family::Q35);
    let mut destination = listening(&qemu, &shared).await;
    let mut stranger = UnixStream::connect(destination.run_dir().join(INCOMING_SOCKET))
        .await
        .unwrap();
    stranger.write_all(&[0x5a; 4096]).await.unwrap();
    let told = destination
        .until(|h| matches!(h, Happened::LoadFailed { .. } | Happened::Died { .. }))
        .await;
    assert!(!told.contains(&Happened::Loaded), "{told:?}");
    let second = UnixStream::connect(destination.run_dir().join(INCOMING_SOCKET)).await;
    assert!(second.is_err(), "one stream is let in, and no other");
    destination.end().await;
}

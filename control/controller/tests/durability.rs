//! Durable first: nothing leaves before its commit, nothing of a failed one, and too much is refused at once.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use std::time::Duration;

use controller::{Ended, Handle, SubmitOptions, WatchItem};
use futures_util::{FutureExt as _, StreamExt as _, future::join_all};
use model::{
    Actor, Code, Command, Outcome, Refusal, Sequence,
    name::Reference,
    query::{HostView, Page, Query, View},
};
use support::{Cell, Fault, Host, PATIENCE, facts};
use uuid::Uuid;
use wire::Down;

const RUN: Uuid = Uuid::from_u128(77);

fn set_schedulable(host: &Host, schedulable: bool) -> Command {
    Command::SetSchedulable {
        host: Reference::Id(host.id.0),
        schedulable,
    }
}

async fn submit(handle: &Handle, actor: &Actor, command: Command) -> Result<Outcome, Refusal> {
    let submitted = handle.submit(actor.clone(), command, SubmitOptions::default());
    tokio::time::timeout(PATIENCE, submitted).await.unwrap()
}

async fn host_view(cell: &Cell, host: &Host) -> HostView {
    let query = Query::Host(Reference::Id(host.id.0));
    match cell.handle.read(cell.admin(), query).await.unwrap() {
        View::Host(view) => *view,
        other => panic!("{other:?}"),
    }
}

/// Whether nothing comes for a while in which everything else runs.
async fn nothing_yet<T>(coming: impl Future<Output = T>) -> bool {
    tokio::time::timeout(Duration::from_millis(200), coming).await.is_err()
}

#[tokio::test]
async fn no_reply_acknowledgement_notice_or_read_leaves_before_the_commit_that_covers_it() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
    let mut watch = cell.handle.watch(cell.admin(), None);
    let mut begun = cell.storage.hold();
    session.report(2, facts(2, 1)).await;
    begun.changed().await.unwrap();
    let read = nothing_yet(host_view(&cell, &host)).await;
    assert!(read && nothing_yet(session.next()).await && nothing_yet(watch.next()).await);
    cell.storage.let_go();
    session.acknowledged(2).await;

    let mut begun = cell.storage.hold();
    let (handle, admin) = (cell.handle.clone(), cell.admin());
    let command = set_schedulable(&host, false);
    let mut reply = tokio::spawn(async move { submit(&handle, &admin, command).await });
    begun.changed().await.unwrap();
    assert!(nothing_yet(&mut reply).await);
    cell.storage.let_go();
    assert_eq!(reply.await.unwrap().unwrap(), Outcome::Done);
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap() {
            WatchItem::Notice(notice) => seen.push(notice.what.clone()),
            other => panic!("{other:?}"),
        }
    }
    seen.sort();
    assert_eq!(seen, ["host.rebooted", "host.unschedulable"]);
    assert!(!host_view(&cell, &host).await.host.spec.schedulable);
}

#[tokio::test]
async fn a_failed_commit_leaks_nothing_and_the_cell_recovers_by_itself() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut watch = cell.handle.watch(cell.admin(), None);
    cell.storage.set(Fault::Full);
    let refusal = submit(&cell.handle, &cell.admin(), set_schedulable(&host, false))
        .await
        .unwrap_err();
    assert!(
        refusal.code == Code::ReadOnly && refusal.message.contains("disk is full"),
        "{refusal:?}"
    );
    assert!(!refusal.hint.is_empty());
    // Reads go on, of what was committed.
    assert!(host_view(&cell, &host).await.host.spec.schedulable);
    assert!(cell.handle.health().read_only.is_some());
    assert!(cell.handle.metrics(&cell.admin()).contains("godwit_read_only 1"));
    let refusal = submit(&cell.handle, &cell.admin(), set_schedulable(&host, false))
        .await
        .unwrap_err();
    assert_eq!(refusal.code, Code::ReadOnly);
    cell.storage.set(Fault::None);
    let recovered = async {
        while submit(&cell.handle, &cell.admin(), set_schedulable(&host, false))
            .await
            .is_err()
        {}
    };
    tokio::time::timeout(PATIENCE, recovered).await.unwrap();
    assert!(cell.handle.health().read_only.is_none());
    assert!(!host_view(&cell, &host).await.host.spec.schedulable);
    let WatchItem::Notice(notice) = watch.next().await.unwrap() else {
        panic!()
    };
    assert_eq!(notice.what, "host.unschedulable");
    assert!(watch.next().now_or_never().is_none(), "the failed one was never told");
}

#[tokio::test]
async fn a_refused_batch_is_as_if_it_had_not_been_asked_and_the_next_goes_through() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    cell.storage.set(Fault::Refuse);
    let refusal = submit(&cell.handle, &cell.admin(), set_schedulable(&host, false))
        .await
        .unwrap_err();
    assert_eq!(refusal.code, Code::Overloaded);
    assert!(host_view(&cell, &host).await.host.spec.schedulable);
    submit(&cell.handle, &cell.admin(), set_schedulable(&host, false))
        .await
        .unwrap();
    assert!(cell.handle.health().read_only.is_none());
}

#[tokio::test]
async fn a_deposed_controller_answers_nothing_but_that_and_ends() {
    let mut cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    cell.storage.set(Fault::Deposed);
    let admin = cell.admin();
    let refusal = submit(&cell.handle, &admin, set_schedulable(&host, false))
        .await
        .unwrap_err();
    assert_eq!(refusal.code, Code::Overloaded);
    assert_eq!(cell.controller().ended().await, Ended::Deposed);
    assert!(matches!(session.next().await, Some(Down::Close { .. })));
    assert!(cell.handle.health().stopped);
    assert!(
        submit(&cell.handle, &admin, set_schedulable(&host, true))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn more_requests_than_are_taken_are_refused_at_once_and_all_that_are_taken_are_answered() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    cell.storage.hold();
    let admin = cell.admin();
    let all: Vec<_> = (0..4000)
        .map(|n| {
            let (handle, admin) = (cell.handle.clone(), admin.clone());
            let command = set_schedulable(&host, n % 2 == 1);
            tokio::spawn(async move { submit(&handle, &admin, command).await })
        })
        .collect();
    is_held_or_full(&cell).await;
    cell.storage.let_go();
    let answers = join_all(all).await;
    let (taken, refused): (Vec<_>, Vec<_>) = answers.into_iter().map(Result::unwrap).partition(Result::is_ok);
    assert!(
        taken.len() >= 1000 && refused.len() >= 2000,
        "{} {}",
        taken.len(),
        refused.len()
    );
    assert!(
        refused
            .into_iter()
            .all(|refusal| refusal.unwrap_err().code == Code::Overloaded)
    );
}

/// Waits until inputs are refused.
async fn is_held_or_full(cell: &Cell) {
    let page = Page { limit: 1, after: None };
    loop {
        let read = cell.handle.read(cell.admin(), Query::Hosts(page));
        match tokio::time::timeout(Duration::from_millis(100), read).await {
            Ok(Err(refusal)) => return assert_eq!(refusal.code, Code::Overloaded),
            Ok(Ok(_)) => panic!("a read was answered while a commit was held"),
            Err(_) => {}
        }
    }
}

#[tokio::test]
async fn a_watcher_resumes_from_the_stored_ring_after_a_crash() {
    let mut cell = Cell::start().await;
    let host = cell.join("h1").await;
    for schedulable in [false, true, false] {
        submit(&cell.handle, &cell.admin(), set_schedulable(&host, schedulable))
            .await
            .unwrap();
    }
    let mut watch = cell.handle.watch(cell.admin(), Some(Sequence(0)));
    let mut sequences = Vec::new();
    while sequences.len() < 2 {
        let Some(WatchItem::Notice(notice)) = watch.next().await else {
            panic!()
        };
        sequences.push(notice.sequence);
    }
    cell.crash().await;
    submit(&cell.handle, &cell.admin(), set_schedulable(&host, true))
        .await
        .unwrap();
    let mut watch = cell.handle.watch(cell.admin(), sequences.last().copied());
    while sequences.len() < 5 {
        let Some(WatchItem::Notice(notice)) = watch.next().await else {
            panic!()
        };
        sequences.push(notice.sequence);
    }
    assert_eq!(sequences, (1..=5).map(Sequence).collect::<Vec<_>>());
    let mut ahead = cell.handle.watch(cell.admin(), Some(Sequence(1000)));
    assert!(matches!(
        ahead.next().await,
        Some(WatchItem::Lagged { at: Sequence(5) })
    ));
    let mut tenant = cell.admin();
    (tenant.role, tenant.project) = (model::Role::Viewer, Uuid::from_u128(5).into());
    tenant.via = model::Via::default();
    assert!(
        cell.handle
            .watch(tenant, Some(Sequence(0)))
            .next()
            .now_or_never()
            .is_none()
    );
}

#[tokio::test]
async fn a_stopping_controller_answers_what_it_has_taken() {
    let mut cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    let mut begun = cell.storage.hold();
    let (handle, admin) = (cell.handle.clone(), cell.admin());
    let first = set_schedulable(&host, false);
    let first = tokio::spawn({
        let (handle, admin) = (handle.clone(), admin.clone());
        async move { submit(&handle, &admin, first).await }
    });
    begun.changed().await.unwrap();
    let second = set_schedulable(&host, true);
    let mut second = tokio::spawn(async move { submit(&handle, &admin, second).await });
    tokio::task::yield_now().await;
    assert!((&mut second).now_or_never().is_none());
    let stopping = tokio::spawn(cell.controller.take().unwrap().stop());
    cell.storage.let_go();
    assert_eq!(first.await.unwrap().unwrap(), Outcome::Done);
    assert_eq!(second.await.unwrap().unwrap(), Outcome::Done);
    assert!(matches!(session.next().await, Some(Down::Close { .. })));
    tokio::time::timeout(PATIENCE, stopping).await.unwrap().unwrap();
}

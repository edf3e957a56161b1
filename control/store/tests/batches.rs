//! Promises about batches: whole or not at all, and nothing that was promised is taken back.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{future::Future as _, path::Path, task::Poll};

use model::{
    Change, Generation, Key, Millis, OperationId, OperationState, Revision, Row, Timestamp, VmId, VolumeId,
    id::Sequence, query::Page,
};
use sqlx::{Connection as _, SqliteConnection};
use store::{CommitError, Retention, Store};
use support::*;

async fn with_world(dir: &Path) -> Store {
    let (store, empty) = Store::open(dir).await.unwrap();
    assert!(empty.rows.is_empty());
    store.commit(put(world())).await.unwrap();
    store
}

/// The batch is refused, and the store is as it was.
async fn refused(store: &Store, batch: Vec<Change>) -> CommitError {
    let before = store.reload().await.unwrap();
    let error = store.commit(batch).await.unwrap_err();
    let after = store.reload().await.unwrap();
    assert_eq!(before.rows, after.rows);
    assert_eq!(before.last_notice, after.last_notice);
    error
}

#[tokio::test]
async fn every_kind_of_row_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    drop(with_world(dir.path()).await);
    let (store, loaded) = Store::open(dir.path()).await.unwrap();
    assert_eq!(sorted(loaded.rows), in_world(&world()));
    assert_eq!(loaded.last_notice, Sequence(1));
    assert_eq!(
        store.answer(project_id(), "key-100").await.unwrap(),
        Some(answer(0x100))
    );
    assert_eq!(store.answer(project_id(), "other").await.unwrap(), None);
    let page = store.notices_after(Sequence(0), 10).await.unwrap();
    assert_eq!((page.notices.len(), page.missed), (1, false));
}

#[tokio::test]
async fn every_kind_of_row_is_deleted_by_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    store
        .commit(world().iter().map(|row| Change::Delete(row.key())).collect())
        .await
        .unwrap();
    assert_eq!(store.reload().await.unwrap().rows, []);
    assert_eq!(store.answer(project_id(), "key-100").await.unwrap(), None);
    assert_eq!(store.notices_after(Sequence(0), 10).await.unwrap().notices, []);
}

#[tokio::test]
async fn commits_are_numbered_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let (store, first) = Store::open(dir.path()).await.unwrap();
    let one = store.commit(put(base())).await.unwrap();
    let two = store.commit(vec![]).await.unwrap();
    drop(store);
    let (store, second) = Store::open(dir.path()).await.unwrap();
    let three = store.commit(vec![]).await.unwrap();
    assert!(one < two && two < three);
    assert!(first.epoch < second.epoch);
}

#[tokio::test]
async fn a_vm_never_goes_back_to_an_older_generation_or_revision_and_the_batch_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let mut newer = vm(0x100);
    newer.revision = Revision(5);
    newer.status.ordered = Revision(5);
    newer.status.generation = Generation(5);
    newer.status.highest = Generation(6);
    store.commit(put([Row::Vm(Box::new(newer.clone()))])).await.unwrap();

    let stale: [fn(&mut model::Vm); 3] = [
        |vm| vm.revision = Revision(4),
        |vm| vm.status.ordered = Revision(4),
        |vm| vm.status.highest = Generation(5),
    ];
    for change in stale {
        let mut older = newer.clone();
        change(&mut older);
        let error = refused(
            &store,
            put(creation(0x200, 2).into_iter().chain([Row::Vm(Box::new(older))])),
        )
        .await;
        assert!(matches!(error, CommitError::Stale { table: "vm", .. }), "{error}");
        assert_eq!(store.answer(project_id(), "key-200").await.unwrap(), None);
        assert!(store.notices_after(Sequence(1), 10).await.unwrap().notices.is_empty());
    }
    let mut more = newer;
    more.status.generation = Generation(7); // above the highest reserved
    let error = refused(&store, put([Row::Vm(Box::new(more))])).await;
    assert!(matches!(error, CommitError::Conflict { .. }), "{error}");
}

#[tokio::test]
async fn the_one_stale_row_of_a_large_batch_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let mut newer = vm(0x100);
    newer.revision = Revision(5);
    store.commit(put([Row::Vm(Box::new(newer))])).await.unwrap();
    let mut batch: Vec<Row> = (2..150).flat_map(|n| creation(n << 8, n as u64)).collect();
    batch.insert(500, Row::Vm(Box::new(vm(0x100))));
    match refused(&store, put(batch.clone())).await {
        CommitError::Stale { table: "vm", key } => assert_eq!(key, uuid(0x100).to_string()),
        other => panic!("{other}"),
    }
    batch.remove(500);
    store.commit(put(batch)).await.unwrap();
    let orders: Vec<Change> = (2..150).map(|n| Change::Delete(order(n << 8, 1).key())).collect();
    store.commit(orders).await.unwrap();
    let left = store.reload().await.unwrap().rows;
    assert_eq!(
        left.iter()
            .filter(|row| matches!(row, Row::Outbox(_)))
            .collect::<Vec<_>>(),
        [&order(0x100, 1)]
    );
    assert_eq!(left.iter().filter(|row| matches!(row, Row::Vm(_))).count(), 149);
}

#[tokio::test]
async fn names_macs_and_addresses_are_unique_and_references_lead_somewhere() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let mut same_name = vm(0x200);
    same_name.name = vm(0x100).name;
    let mut same_mac = port(0x200);
    (same_mac.vm, same_mac.mac) = (None, port(0x100).mac);
    let mut same_ip = port(0x200);
    (same_ip.vm, same_ip.ip) = (None, port(0x100).ip);
    let of_no_vm = port(0x200);
    for (row, what) in [
        (Row::Vm(Box::new(same_name)), "vm.name"),
        (Row::Port(same_mac), "port.mac"),
        (Row::Port(same_ip), "port.ip"),
        (Row::Port(of_no_vm), "FOREIGN KEY"),
    ] {
        match refused(&store, put([notice(2), row])).await {
            CommitError::Conflict { constraint } => assert!(constraint.contains(what), "{constraint}"),
            other => panic!("{other}"),
        }
    }
    let error = refused(&store, vec![Change::Delete(Key::Vm(VmId(uuid(0x100))))]).await;
    assert!(
        matches!(error, CommitError::Conflict { .. }),
        "its port and volume would lead nowhere: {error}"
    );
}

#[tokio::test]
async fn rows_of_a_batch_may_refer_to_each_other_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path()).await.unwrap();
    let mut rows = world();
    rows.reverse();
    store.commit(put(rows)).await.unwrap();
    assert_eq!(sorted(store.reload().await.unwrap().rows), in_world(&world()));
}

#[tokio::test]
async fn a_name_freed_in_a_batch_may_be_taken_in_it_and_the_last_change_of_a_row_counts() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let mut heir = vm(0x200);
    heir.name = vm(0x100).name;
    let mut early = heir.clone();
    early.name = name("early");
    let gone = [
        Key::Port(port(0x100).id),
        Key::Volume(VolumeId(uuid(0x102))),
        Key::Vm(VmId(uuid(0x100))),
    ];
    let mut batch = put([early, heir.clone()].map(|vm| Row::Vm(Box::new(vm))));
    batch.extend(gone.into_iter().map(Change::Delete));
    store.commit(batch).await.unwrap();
    let rows = store.reload().await.unwrap().rows;
    let vms: Vec<_> = rows.into_iter().filter(|row| matches!(row, Row::Vm(_))).collect();
    assert_eq!(vms, [Row::Vm(Box::new(heir))]);
}

#[tokio::test]
async fn an_idempotency_key_keeps_its_first_answer_for_a_day() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    store.commit(put([Row::Answer(answer(0x100))])).await.unwrap(); // the same again
    let mut other_body = answer(0x100);
    other_body.body_hash = [8; 32];
    let mut other_operation = answer(0x100);
    other_operation.operation = OperationId(uuid(99));
    for other in [other_body, other_operation] {
        let error = refused(&store, put([Row::Answer(other)])).await;
        assert!(matches!(error, CommitError::Stale { table: "answer", .. }), "{error}");
    }
    assert_eq!(
        store.answer(project_id(), "key-100").await.unwrap(),
        Some(answer(0x100))
    );
    let mut next_day = answer(0x100);
    next_day.body_hash = [8; 32];
    next_day.operation = OperationId(uuid(99));
    next_day.at = next_day.at.after(Millis::seconds(24 * 3600 - 1));
    let error = refused(&store, put([Row::Answer(next_day.clone())])).await;
    assert!(matches!(error, CommitError::Stale { table: "answer", .. }), "{error}");
    next_day.at = next_day.at.after(Millis::seconds(1));
    store.commit(put([Row::Answer(next_day.clone())])).await.unwrap();
    assert_eq!(store.answer(project_id(), "key-100").await.unwrap(), Some(next_day));
}

#[tokio::test]
async fn what_is_over_stays_over_and_notices_are_never_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let over = |state| put([Row::Operation(Box::new(operation(0x100, state)))]);
    store.commit(over(OperationState::Succeeded)).await.unwrap();
    for state in [OperationState::Running, failed()] {
        let error = refused(&store, over(state)).await;
        assert!(
            matches!(error, CommitError::Stale { table: "operation", .. }),
            "{error}"
        );
    }
    let error = refused(&store, put([notice(1)])).await;
    assert!(matches!(error, CommitError::Stale { table: "notice", .. }), "{error}");
}

#[tokio::test]
async fn the_outbox_keeps_the_newest_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    store.commit(put([order(0x100, 3)])).await.unwrap();
    let error = refused(&store, put([order(0x100, 2)])).await;
    assert!(matches!(error, CommitError::Stale { table: "outbox", .. }), "{error}");
    assert!(store.reload().await.unwrap().rows.contains(&order(0x100, 3)));
}

#[tokio::test]
async fn a_deposed_leader_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let mut other = raw(dir.path()).await;
    sqlx::query("UPDATE leader SET epoch = epoch + 1")
        .execute(&mut other)
        .await
        .unwrap();
    let error = store.commit(put(creation(0x200, 2))).await.unwrap_err();
    assert!(matches!(error, CommitError::Deposed), "{error}");
    let vms: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM vm")
        .fetch_one(&mut other)
        .await
        .unwrap();
    assert_eq!(vms, 1);
    assert!(store.reload().await.is_err(), "it may not even look as if it led");
}

#[tokio::test]
async fn a_commit_whose_caller_goes_away_does_not_harm_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let (mut finished, mut dropped) = (0, 0);
    for polls in 0..40 {
        let mut commit = Box::pin(store.commit(put(creation(0x200 + (polls << 8), 2 + polls as u64))));
        let mut left = polls;
        // Each poll but the first follows a wake-up: the commit is dropped a step further on in each round.
        std::future::poll_fn(|context| match commit.as_mut().poll(context) {
            Poll::Pending if left > 0 => {
                left -= 1;
                Poll::Pending
            }
            _ => Poll::Ready(()),
        })
        .await;
        drop(commit);
        store.commit(vec![]).await.unwrap();
        let key = format!("key-{:x}", 0x200 + (polls << 8));
        match store.answer(project_id(), &key).await.unwrap() {
            Some(_) => finished += 1,
            None => dropped += 1,
        }
    }
    assert!(finished > 0 && dropped > 1, "{finished} {dropped}");
    let rows = store.reload().await.unwrap().rows;
    let count = |wanted: fn(&Row) -> bool| rows.iter().filter(|row| wanted(row)).count();
    // Whole or not at all: as many ports as VMs.
    assert_eq!(
        count(|row| matches!(row, Row::Vm(_))),
        count(|row| matches!(row, Row::Port(_)))
    );
}

#[tokio::test]
async fn a_number_that_cannot_be_stored_is_refused_without_harm() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let mut huge = vm(0x100);
    huge.revision = Revision(u64::MAX);
    let error = refused(&store, put([Row::Vm(Box::new(huge))])).await;
    assert!(matches!(error, CommitError::Encode { table: "vm", .. }), "{error}");
}

#[tokio::test]
async fn finished_operations_are_paged_newest_first_and_leave_the_world() {
    let dir = tempfile::tempdir().unwrap();
    let store = with_world(dir.path()).await;
    let ids: Vec<u128> = (2..12).map(|n| n << 8).collect();
    let rows = ids
        .iter()
        .map(|n| Row::Operation(Box::new(operation(*n, OperationState::Succeeded))));
    store.commit(put(rows)).await.unwrap();
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page = store
            .operations(Some(project_id()), Page { limit: 4, after })
            .await
            .unwrap();
        assert!(page.items.len() <= 4);
        seen.extend(page.items.iter().map(|operation| operation.target.id.as_u128()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let mut expected = ids;
    expected.insert(0, 0x100);
    expected.reverse();
    assert_eq!(seen, expected);
    let other = model::ProjectId(uuid(77));
    assert!(
        store
            .operations(Some(other), Page { limit: 4, after: None })
            .await
            .unwrap()
            .items
            .is_empty()
    );
    assert_eq!(
        store
            .operations(None, Page { limit: 0, after: None })
            .await
            .unwrap()
            .items
            .len(),
        1
    );
    let running = store
        .reload()
        .await
        .unwrap()
        .rows
        .into_iter()
        .filter(|row| matches!(row, Row::Operation(_)));
    assert_eq!(running.count(), 1);
    let found = store.operation(OperationId(uuid(0x203))).await.unwrap();
    assert_eq!(found, Some(operation(0x200, OperationState::Succeeded)));
}

#[tokio::test]
async fn history_stays_within_its_bounds_and_a_watcher_learns_what_it_missed() {
    let dir = tempfile::tempdir().unwrap();
    let retention = Retention {
        notices_max: 10,
        operations_max: 5,
        answers_max: 7,
        answer_age_max: Millis::seconds(3600),
        ..Retention::default()
    };
    let (store, _) = Store::open_with(dir.path(), retention).await.unwrap();
    store.commit(put(base())).await.unwrap();
    let history = |n: u128| {
        let state = if n == 1 {
            OperationState::Running
        } else {
            OperationState::Succeeded
        };
        let mut answer = answer(n << 8);
        answer.at = Timestamp(answer.at.0 + n as i64);
        [
            Row::Operation(Box::new(operation(n << 8, state))),
            Row::Answer(answer),
            notice(n as u64),
        ]
    };
    for from in (1..4801).step_by(800) {
        store.commit(put((from..from + 800).flat_map(history))).await.unwrap();
    }
    let count = async |table: &'static str| -> i64 {
        let mut other = raw(dir.path()).await;
        sqlx::query_scalar(table).fetch_one(&mut other).await.unwrap()
    };
    assert!(
        count("SELECT COUNT(*) FROM notice").await < 5000,
        "pruned while running"
    );
    drop(store);
    let (store, loaded) = Store::open_with(dir.path(), retention).await.unwrap();
    assert_eq!(count("SELECT COUNT(*) FROM notice").await, 10);
    assert_eq!(count("SELECT COUNT(*) FROM answer").await, 7);
    assert_eq!(
        count("SELECT COUNT(*) FROM operation").await,
        6,
        "the running one is not history"
    );
    assert!(
        loaded
            .rows
            .iter()
            .any(|row| matches!(row, Row::Operation(o) if o.state == OperationState::Running))
    );
    assert_eq!(loaded.last_notice, Sequence(4800));
    assert!(store.notices_after(Sequence(4000), 5).await.unwrap().missed);
    let tail = store.notices_after(Sequence(4790), 5).await.unwrap();
    assert_eq!(
        (tail.notices.len(), tail.notices[0].sequence, tail.missed),
        (5, Sequence(4791), false)
    );

    // An answer much younger than the rest makes them too old.
    let mut young = answer(1 << 40);
    young.at = Timestamp(young.at.0 + 4_000_000);
    store.commit(put([Row::Answer(young)])).await.unwrap();
    drop(store);
    let (_store, _) = Store::open_with(dir.path(), retention).await.unwrap();
    assert_eq!(count("SELECT COUNT(*) FROM answer").await, 1);
}

async fn raw(dir: &Path) -> SqliteConnection {
    let path = dir.join("cell.sqlite");
    SqliteConnection::connect(path.to_str().unwrap()).await.unwrap()
}

//! Promises about what survives: kill -9, a full disk, damage, upgrades and second openers, on real files.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use model::{Change, Row, Timestamp, audit::AuditFilter, id::Sequence, query::Page};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};
use sqlx::{Connection as _, SqliteConnection};
use store::{CommitError, OpenError, SCHEMA_VERSION, Store};
use support::*;

const WRITER_DIR: &str = "STORE_TEST_WRITER_DIR";
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v1.sqlite");
const FIXTURE_V2: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v2.sqlite");
const FIXTURE_V3: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v3.sqlite");

fn vms(rows: &[Row]) -> Vec<u128> {
    rows.iter()
        .filter_map(|row| {
            if let Row::Vm(vm) = row {
                Some(vm.id.0.as_u128())
            } else {
                None
            }
        })
        .collect()
}

#[tokio::test]
async fn a_store_dropped_without_closing_keeps_what_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path()).await.unwrap();
    store.commit(put(world())).await.unwrap();
    drop(store);
    let (_store, loaded) = Store::open(dir.path()).await.unwrap();
    assert_eq!(sorted(loaded.rows), in_world(&world()));
}

/// Not a test by itself: the process that the next test kills. It prints each commit after it was acknowledged.
#[test]
fn writer_process() {
    let Some(dir) = std::env::var_os(WRITER_DIR).map(PathBuf::from) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (store, loaded) = Store::open(&dir).await.unwrap();
        if loaded.rows.is_empty() {
            store.commit(put(base())).await.unwrap();
        }
        let mut sequence = loaded.last_notice.0;
        loop {
            sequence += 1;
            let n = u128::from(sequence) << 8;
            store.commit(put(creation(n, sequence))).await.unwrap();
            let mut out = std::io::stdout().lock();
            writeln!(out, "\ncommitted {sequence}").unwrap();
            out.flush().unwrap();
        }
    });
}

#[test]
fn every_acknowledged_commit_survives_kill_9_and_no_half_one_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut acknowledged = 0;
    for round in 0..8u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--nocapture"])
            .env(WRITER_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let mut heard = |latest: &mut u64| {
            let number = lines.find_map(|line| line.unwrap().strip_prefix("committed ")?.parse().ok());
            *latest = number.unwrap_or(*latest);
            number.is_some()
        };
        for _ in 0..5 + round * 7 {
            assert!(heard(&mut acknowledged), "the writer ended by itself");
        }
        writer.kill().unwrap();
        while heard(&mut acknowledged) {}
        writer.wait().unwrap();

        runtime.block_on(async {
            let (store, loaded) = Store::open(dir.path()).await.unwrap();
            let found = vms(&loaded.rows);
            assert!(
                loaded.last_notice >= Sequence(acknowledged),
                "{:?} < {acknowledged}",
                loaded.last_notice
            );
            let expected: Vec<u128> = (1..=u128::from(loaded.last_notice.0)).map(|n| n << 8).collect();
            assert_eq!(found, expected, "as many VMs as notices, none half");
            for n in expected {
                assert!(
                    store
                        .answer(project_id(), &format!("key-{n:x}"))
                        .await
                        .unwrap()
                        .is_some()
                );
            }
        });
    }
}

/// A small disk of its own, in a private mount namespace that ends with the thread.
fn on_small_disk(size: &str, test: impl FnOnce(&Path) + Send + 'static) {
    let size = format!("size={size}");
    let outcome = std::thread::spawn(move || {
        let dir = tempfile::tempdir().unwrap();
        #[allow(unsafe_code)]
        // SAFETY: only this thread's mounts are unshared, which changes no memory or descriptor of other threads.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
            .expect("this test needs root, for a mount namespace");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let data = std::ffi::CString::new(size).unwrap();
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        test(dir.path());
        rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    });
    if let Err(panic) = outcome.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_full_disk_makes_the_store_read_only_until_there_is_space_again() {
    on_small_disk("3m", |dir| {
        // The database's thread starts from this one and so sees the small disk.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            fs::write(dir.join("ballast"), vec![0; 1 << 20]).unwrap();
            let (store, _) = Store::open(&dir.join("store")).await.unwrap();
            store.commit(put(base())).await.unwrap();
            let mut committed = 0;
            let error = loop {
                let sequence = committed + 1;
                match store.commit(put(creation(u128::from(sequence) << 8, sequence))).await {
                    Ok(_) => committed = sequence,
                    Err(error) => break error,
                }
                assert!(committed < 100_000, "the disk never fills");
            };
            assert!(
                matches!(&error, CommitError::ReadOnly { reason, .. } if reason.contains("full")),
                "{error}"
            );
            assert!(error.to_string().contains("free space"), "{error}");
            let again = store.commit(vec![]).await.unwrap_err();
            assert!(
                matches!(again, CommitError::ReadOnly { .. }),
                "refused at once: {again}"
            );
            let answer = store.answer(project_id(), "key-100").await.unwrap();
            assert!(answer.is_some(), "reads go on");

            fs::remove_file(dir.join("ballast")).unwrap();
            let loaded = store.reload().await.unwrap();
            assert_eq!(loaded.last_notice, Sequence(committed));
            assert_eq!(vms(&loaded.rows).len() as u64, committed);
            let next = committed + 1;
            store.commit(put(creation(u128::from(next) << 8, next))).await.unwrap();
        });
    });
}

#[test]
fn a_store_that_finds_no_space_at_start_says_so() {
    on_small_disk("64k", |dir| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let error = runtime.block_on(Store::open(dir)).err().unwrap();
        assert!(error.to_string().contains("space"), "{error}");
    });
}

#[tokio::test]
async fn a_second_opener_is_refused_by_name_and_the_first_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path()).await.unwrap();
    let error = Store::open(dir.path()).await.err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(
        error.to_string().contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    store.commit(put(base())).await.unwrap();
    drop(store);
    Store::open(dir.path()).await.unwrap();
}

#[tokio::test]
async fn a_store_of_a_newer_program_is_refused_untouched() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path()).await.unwrap());
    let path = dir.path().join("cell.sqlite");
    let mut raw = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
    let newer = SCHEMA_VERSION + 1;
    sqlx::query("INSERT INTO schema_version (version) VALUES ($1)")
        .bind(newer)
        .execute(&mut raw)
        .await
        .unwrap();
    raw.close().await.unwrap();
    let before = fs::read(&path).unwrap();
    let error = Store::open(dir.path()).await.err().unwrap();
    assert!(
        matches!(error, OpenError::Newer { found, .. } if found == newer),
        "{error}"
    );
    assert!(error.to_string().contains("use the newer program"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_row_of_a_newer_form_is_refused_by_table() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path()).await.unwrap();
    store.commit(put(world())).await.unwrap();
    drop(store);
    let path = dir.path().join("cell.sqlite");
    let mut raw = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
    sqlx::query("UPDATE vm SET body_version = 99")
        .execute(&mut raw)
        .await
        .unwrap();
    raw.close().await.unwrap();
    let error = Store::open(dir.path()).await.err().unwrap();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("table vm has form 99"), "{cause}");
}

#[tokio::test]
async fn damage_is_found_at_start() {
    for (at, bytes) in [(0, b"garbage, no database".as_slice()), (8192, &[0xff; 4096])] {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).await.unwrap();
        store.commit(put(world())).await.unwrap();
        drop(store);
        let path = dir.path().join("cell.sqlite");
        // Everything into the main file first.
        let mut raw = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .fetch_all(&mut raw)
            .await
            .unwrap();
        raw.close().await.unwrap();
        let mut file = fs::read(&path).unwrap();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, file).unwrap();
        let error = Store::open(dir.path()).await.err().unwrap();
        assert!(
            matches!(error, OpenError::Damaged { .. }),
            "{error}: {:?}",
            std::error::Error::source(&error)
        );
    }
}

#[tokio::test]
async fn only_the_owner_may_read_the_store() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("state/store");
    let (store, _) = Store::open(&dir).await.unwrap();
    store.commit(put(world())).await.unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    let mut files = 0;
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        files += 1;
    }
    assert_eq!(files, 4, "database, log, index of the log, lock");
}

#[tokio::test]
async fn a_directory_that_is_a_file_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Store::open(&file).await.err().unwrap();
    assert!(matches!(error, OpenError::Directory { .. }), "{error}");
}

#[tokio::test]
async fn a_store_of_schema_1_opens_with_all_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(FIXTURE, dir.path().join("cell.sqlite")).unwrap();
    let (store, loaded) = Store::open(dir.path()).await.unwrap();
    assert_eq!(sorted(loaded.rows), in_world(&world()));
    assert_eq!(loaded.last_notice, Sequence(1));
    assert_eq!(
        store.answer(project_id(), "key-100").await.unwrap(),
        Some(answer(0x100))
    );
    store.commit(put(creation(0x200, 2))).await.unwrap();
}

#[tokio::test]
async fn a_store_of_schema_2_opens_with_all_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(FIXTURE_V2, dir.path().join("cell.sqlite")).unwrap();
    let (store, loaded) = Store::open(dir.path()).await.unwrap();
    assert_eq!(sorted(loaded.rows), in_world(&world_v2()));
    let all = store.audit(&AuditFilter::default(), page(10, None)).await.unwrap();
    assert_eq!((all.items.len(), all.next), (1, None));
}

#[tokio::test]
async fn a_store_of_schema_3_opens_with_all_its_rows_and_a_seed_goes_with_its_vm() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(FIXTURE_V3, dir.path().join("cell.sqlite")).unwrap();
    let (store, loaded) = Store::open(dir.path()).await.unwrap();
    assert_eq!(sorted(loaded.rows), in_world(&world_v3()));
    let gone = |row: &Row| matches!(row, Row::Vm(_) | Row::Port(_) | Row::Volume(_));
    let vm: Vec<Change> = creation(0x100, 1)
        .iter()
        .filter(|row| gone(row))
        .map(|row| Change::Delete(row.key()))
        .collect();
    let kept = store.commit(vm.clone()).await;
    assert!(kept.is_err(), "a seed without its VM is refused");
    let with_seed = vm.into_iter().chain([Change::Delete(seed(0x100).key())]).collect();
    store.commit(with_seed).await.unwrap();
    assert!(
        !store
            .reload()
            .await
            .unwrap()
            .rows
            .iter()
            .any(|row| matches!(row, Row::Seed(_)))
    );
}

fn page(limit: usize, after: Option<uuid::Uuid>) -> Page {
    Page { limit, after }
}

#[tokio::test]
async fn the_audit_log_is_paged_filtered_never_rewritten_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let retention = store::Retention {
        audit_max: 6,
        audit_age_max: model::Millis(1000),
        ..store::Retention::default()
    };
    let (store, _) = Store::open_with(dir.path(), retention).await.unwrap();
    store.commit(put(base())).await.unwrap();
    let at = |n: u128| Timestamp(1_700_000_000_000 + 100 * i64::try_from(n).unwrap());
    let who = |n: u128| if n.is_multiple_of(2) { "alice" } else { "bob" };
    store
        .commit(put((0..8).map(|n| audit_entry(n, at(n), who(n)))))
        .await
        .unwrap();
    let times = |listing: &model::query::Listing<model::AuditEntry>| -> Vec<i64> {
        listing.items.iter().map(|entry| (entry.at.0 - at(0).0) / 100).collect()
    };
    let all = AuditFilter::default();
    let first = store.audit(&all, page(5, None)).await.unwrap();
    assert_eq!(times(&first), [7, 6, 5, 4, 3]);
    let rest = store.audit(&all, page(5, first.next)).await.unwrap();
    assert_eq!((times(&rest), rest.next), (vec![2, 1, 0], None));
    let some = AuditFilter {
        project: Some(project_id()),
        subject: Some("alice".to_owned()),
        from: Some(at(2)),
        until: Some(at(6)),
    };
    assert_eq!(times(&store.audit(&some, page(5, None)).await.unwrap()), [4, 2]);
    let elsewhere = AuditFilter {
        project: Some(model::ProjectId(uuid(99))),
        ..some
    };
    assert!(store.audit(&elsewhere, page(5, None)).await.unwrap().items.is_empty());

    let forged = store.commit(put([audit_entry(3, at(3), "mallory")])).await;
    assert!(forged.is_err(), "an entry is never rewritten");
    let kept = store.audit(&all, page(10, None)).await.unwrap();
    assert!(kept.items.iter().all(|entry| entry.subject != "mallory"));

    drop(store);
    let (store, _) = Store::open_with(dir.path(), retention).await.unwrap();
    assert_eq!(
        times(&store.audit(&all, page(10, None)).await.unwrap()),
        [7, 6, 5, 4, 3, 2]
    );
    store.commit(put([audit_entry(15, at(15), "bob")])).await.unwrap();
    drop(store);
    let (store, _) = Store::open_with(dir.path(), retention).await.unwrap();
    assert_eq!(times(&store.audit(&all, page(10, None)).await.unwrap()), [15, 7, 6, 5]);
}

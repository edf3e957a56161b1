//! Blobs between two hosts: who may have them, once, whole or not at all.

#![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

use std::sync::atomic::{AtomicUsize, Ordering};

use model::{Epoch, TemplateId};
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use super::*;
use crate::fixture::{Cell, host_id, pool_id};

/// Two hosts; the first has a blob of 4 MiB and listens.
struct Two {
    _cell: Cell,
    one: Arc<Shared>,
    other: Arc<Shared>,
    blob: Blob,
    at: std::net::SocketAddr,
}

async fn two() -> Two {
    let cell = Cell::new();
    let (one, other) = (cell.host(1).await, cell.host(2).await);
    let bytes = b"godwit".repeat((4 << 20) / 6);
    let blob = Blob {
        digest: Digest(Sha256::digest(&bytes).into()),
        size_bytes: bytes.len() as u64,
    };
    pool(&one, 1).pool.receive_blob(blob, &mut bytes.as_slice()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(peers::listen(Arc::clone(&one), listener));
    Two {
        _cell: cell,
        one,
        other,
        blob,
        at,
    }
}

fn pool(shared: &Shared, n: u128) -> Arc<NamedPool> {
    shared.pool(pool_id(n)).unwrap()
}

fn holder(at: std::net::SocketAddr) -> Holder {
    Holder {
        host: host_id(1),
        address: at.ip(),
        peer_port: at.port(),
    }
}

fn lends(two: &Two) {
    two.one.blobs.lend(&Lend {
        epoch: Epoch(1),
        template: TemplateId(Uuid::nil()),
        pool: pool_id(1),
        to: host_id(2),
        blobs: vec![two.blob.digest],
    });
}

/// What is in the second host's pool, whole or half.
fn files(two: &Two) -> usize {
    let root = pool(&two.other, 2).pool.path().to_owned();
    let count = |directory: PathBuf| std::fs::read_dir(directory).unwrap().count();
    let sessions = std::fs::read_dir(root.join("incoming"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    count(root.join("blobs")) + sessions.filter(|path| path.is_dir()).map(count).sum::<usize>()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_host_learns_of_a_blob_that_was_not_lent_to_it() {
    let two = two().await;
    let (there, missing) = (
        two.blob,
        Blob {
            digest: Digest([9; 32]),
            ..two.blob
        },
    );
    let (into, holders) = (pool(&two.other, 2), [holder(two.at)]);
    let ask = |blob| fetch(&two.other, &into, blob, &holders, |_| {});
    let (there, missing) = tokio::join!(ask(there), ask(missing));
    let (there, missing) = (there.unwrap_err().message, missing.unwrap_err().message);
    assert!(there.contains("may be lent"), "{there}");
    let digests = (two.blob.digest.to_string(), Digest([9; 32]).to_string());
    assert_eq!(there.replace(&digests.0, ""), missing.replace(&digests.1, ""));
    // Lent to another host, it is still nothing to this one.
    two.one.blobs.lend(&Lend {
        epoch: Epoch(1),
        template: TemplateId(Uuid::nil()),
        pool: pool_id(1),
        to: host_id(3),
        blobs: vec![two.blob.digest],
    });
    assert_eq!(two.one.blobs.lent_to(host_id(2), two.blob.digest), None);
    assert_eq!(files(&two), 0);
}

/// A way to the first host that breaks off after so many bytes, the first time; counts who came.
async fn breaking(to: std::net::SocketAddr, after: u64, count: Arc<AtomicUsize>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let limit = if count.fetch_add(1, Ordering::SeqCst) == 0 {
                after
            } else {
                u64::MAX
            };
            tokio::spawn(async move {
                let (mut up, mut to_client) = client.into_split();
                let (down, mut to_server) = TcpStream::connect(to).await.unwrap().into_split();
                let mut down = down.take(limit);
                tokio::select! {
                    _ = tokio::io::copy(&mut up, &mut to_server) => {}
                    _ = tokio::io::copy(&mut down, &mut to_client) => {}
                }
            });
        }
    });
    at
}

#[tokio::test(flavor = "multi_thread")]
async fn five_who_want_a_blob_fetch_it_once_and_a_cut_goes_on_where_it_was() {
    let two = two().await;
    lends(&two);
    let count = Arc::new(AtomicUsize::new(0));
    let at = breaking(two.at, 2 << 20, Arc::clone(&count)).await;
    let (into, holders) = (pool(&two.other, 2), [holder(at)]);
    let told = Mutex::new(vec![]);
    let one = || fetch(&two.other, &into, two.blob, &holders, |bytes| lock(&told).push(bytes));
    let all = futures_util::future::join_all((0..5).map(|_| one())).await;
    all.into_iter().for_each(|fetched| fetched.unwrap());
    assert_eq!(count.load(Ordering::SeqCst), 2, "once, and once more after the cut");
    assert!(into.pool.blob_is_intact(two.blob.digest).unwrap());
    assert!(
        lock(&told).iter().any(|bytes| *bytes > 0),
        "nobody was told how far it is"
    );
    assert_eq!(files(&two), 1);
    assert!(lock(&two.other.blobs.fetches).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_the_blobs_are_refused_and_leave_nothing() {
    let two = two().await;
    lends(&two);
    let path = pool(&two.one, 1).pool.blob_path(two.blob.digest);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, vec![7; usize::try_from(two.blob.size_bytes).unwrap()]).unwrap();
    let (into, holders) = (pool(&two.other, 2), [holder(two.at)]);
    let refused = fetch(&two.other, &into, two.blob, &holders, |_| {}).await.unwrap_err();
    // After the host that lent them the controller is asked, which is not there.
    assert!(refused.message.contains("the controller is not connected"), "{refused}");
    assert_eq!(files(&two), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_for_which_nobody_waits_ends_and_leaves_nothing() {
    let two = two().await;
    let into = pool(&two.other, 2);
    let holders = [holder(two.at)];
    // It waits for the controller's word to the lender.
    let waits = timeout(
        Duration::from_millis(200),
        fetch(&two.other, &into, two.blob, &holders, |_| {}),
    );
    assert!(waits.await.is_err());
    timeout(SILENCE_MAX, two.other.blobs.settled(&into, two.blob.digest))
        .await
        .unwrap();
    assert_eq!(files(&two), 0);
    lends(&two);
    fetch(&two.other, &into, two.blob, &holders, |_| {}).await.unwrap();
    assert_eq!(files(&two), 1);
}

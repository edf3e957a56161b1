//! Blobs on their way between hosts, pools and the controller: each is fetched once, however many wait for it, and lent only where the
//! controller said so.
//!
//! ```text
//!   prepare ─┐            ┌─▶ a host that lends it ─┐  cut: goes on where it was,
//!   prepare ─┼─▶ fetch ───┼─▶ another one ──────────┼─▶ there or at the next ──▶ checked, then kept; or nothing is left
//!   import  ─┘  (one)     └─▶ the controller ───────┘
//! ```
//!
//! Invariants:
//! - A blob is in a pool whole, on disk and with its digest, or not at all.
//! - No host learns from another one whether that has a blob, unless the controller had it lent to it.
//! - A fetch for which nobody waits any more ends.

use std::{
    collections::BTreeMap,
    io::{Read, Seek as _, SeekFrom},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, body::Incoming, header};
use image::ReceiveError;
use model::{
    Code, Digest, HostId, Name, OperationId, PoolId, Refusal,
    operation::Progress,
    order::{Holder, Lend, TemplateSource},
    template::{Blob, IMPORT_MAX},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::{Notify, Semaphore, mpsc, watch},
    time::{Instant, timeout},
};
use wire::session::BLOBS_PATH;

use crate::{
    peers,
    session::body_of,
    shared::{NamedPool, Shared, lock},
    template::chain,
};

/// Pieces on their way from the network to the disk.
const PIECES_WAITING_MAX: usize = 64;
/// Bytes of a piece that is read from a disk or from another host.
const PIECE_BYTES: usize = 128 << 10;
/// After this long without a byte a fetch is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Fetches of one host at once: more would only share its link and its disk.
const FETCHES_MAX: usize = 2;
/// Blobs that one host lends at once.
const LENDING_MAX: usize = 4;
/// Blobs that may be lent by what the controller said and nobody asked for yet.
const LENT_MAX: usize = 1024;
/// How long one may be asked for.
const LENT_FOR: Duration = Duration::from_millis(IMPORT_MAX.0);
/// The controller's word to the one that lends may come after the other's question.
const WORD_MAX: Duration = Duration::from_secs(5);
/// How often one source is asked to go on after cuts.
const TRIES_MAX: usize = 4;
/// Bytes between two words of how far a fetch is.
const TOLD_EVERY: u64 = 1 << 20;
/// Between two tries to give the controller a copy while it takes no more.
const GIVE_AGAIN: Duration = Duration::from_secs(1);
const GIVE_TRIES_MAX: usize = 120;
/// Least time between two progress reports of one operation.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Which file: the pool's directory, the blob.
type Which = (PathBuf, Digest);

/// How a fetch is.
#[derive(Clone, Debug)]
enum Fetch {
    /// So many bytes are there.
    UnderWay(u64),
    Over(Result<(), Refusal>),
    /// Nobody waited for it any more.
    GivenUp,
}

/// The blobs that are being fetched, and those that may be lent.
#[derive(Debug)]
pub(crate) struct Blobs {
    fetches: Mutex<BTreeMap<Which, watch::Sender<Fetch>>>,
    /// A fetch ended.
    ended: Notify,
    turns: Semaphore,
    lent: Mutex<BTreeMap<(HostId, Digest), (PoolId, Instant)>>,
    told: Notify,
    lending: Semaphore,
}

impl Default for Blobs {
    fn default() -> Self {
        Self {
            fetches: Mutex::default(),
            ended: Notify::new(),
            turns: Semaphore::new(FETCHES_MAX),
            lent: Mutex::default(),
            told: Notify::new(),
            lending: Semaphore::new(LENDING_MAX),
        }
    }
}

impl Blobs {
    /// The controller has this host lend blobs.
    pub(crate) fn lend(&self, order: &Lend) {
        let now = Instant::now();
        let mut lent = lock(&self.lent);
        lent.retain(|_, (_, until)| *until > now);
        for digest in &order.blobs {
            // More than fit are fetched elsewhere.
            if lent.len() < LENT_MAX {
                lent.insert((order.to, *digest), (order.pool, now + LENT_FOR));
            }
        }
        drop(lent);
        self.told.notify_waiters();
    }

    fn lent_to(&self, host: HostId, digest: Digest) -> Option<PoolId> {
        let (pool, until) = *lock(&self.lent).get(&(host, digest))?;
        (until > Instant::now()).then_some(pool)
    }

    /// The pool from which a blob may be lent to a host, once the controller has said so.
    async fn may_lend(&self, host: HostId, digest: Digest) -> Option<PoolId> {
        let told = async {
            loop {
                let word = self.told.notified();
                let mut word = std::pin::pin!(word);
                // Before looking: a word that comes in between is not missed.
                word.as_mut().enable();
                if let Some(pool) = self.lent_to(host, digest) {
                    return pool;
                }
                word.await;
            }
        };
        timeout(WORD_MAX, told).await.ok()
    }

    /// Waits until nobody writes this blob any more.
    pub(crate) async fn settled(&self, pool: &NamedPool, digest: Digest) {
        let which = (pool.pool.path().to_owned(), digest);
        loop {
            // Not by joining it: that would keep alive what nobody else wants.
            let mut end = std::pin::pin!(self.ended.notified());
            // Before looking: an end that comes in between is not missed.
            end.as_mut().enable();
            if !lock(&self.fetches).contains_key(&which) {
                return;
            }
            end.await;
        }
    }
}

/// Fetches what a pool lacks of a template, for a VM; tells how far that is.
pub(crate) async fn ensure(
    shared: &Arc<Shared>,
    pool: &Arc<NamedPool>,
    template: &TemplateSource,
    operation: Option<OperationId>,
) -> Result<(), Refusal> {
    let all: u64 = template.blobs.iter().map(|blob| blob.size_bytes).sum();
    let mut before = 0;
    let mut last: Option<Instant> = None;
    for blob in &template.blobs {
        let told = |bytes: u64| {
            let due = last.is_none_or(|last| last.elapsed() >= PROGRESS_EVERY);
            if let Some(operation) = operation.filter(|_| due) {
                last = Some(Instant::now());
                shared.progress(operation, progress(&template.name, before + bytes, all));
            }
        };
        let fetched = fetch(shared, pool, *blob, &template.holders, told).await;
        fetched.map_err(|refusal| Refusal {
            message: format!("template {}: {}", template.name, refusal.message),
            ..refusal
        })?;
        before += blob.size_bytes;
    }
    Ok(())
}

fn progress(template: &Name, bytes: u64, all: u64) -> Progress {
    Progress {
        doing: format!(
            "fetching template {template}, {} of {} MiB",
            bytes >> 20,
            all.div_ceil(1 << 20)
        ),
        bytes,
        remaining_bytes: Some(all.saturating_sub(bytes)),
        round: None,
    }
}

/// Fetches a blob, unless the pool has it; one that is being fetched already is waited for. `told` hears how many bytes are there.
pub(crate) async fn fetch(
    shared: &Arc<Shared>,
    pool: &Arc<NamedPool>,
    blob: Blob,
    holders: &[Holder],
    mut told: impl FnMut(u64),
) -> Result<(), Refusal> {
    if is_there(pool, blob).await? {
        return Ok(());
    }
    loop {
        let mut seen = join(shared, pool, blob, holders);
        loop {
            let fetch = seen.borrow_and_update().clone();
            match fetch {
                Fetch::UnderWay(bytes) => told(bytes),
                Fetch::Over(result) => return result,
                // Just before this one came.
                Fetch::GivenUp => break,
            }
            if seen.changed().await.is_err() {
                return Err(not_fetched(blob, &pool.name, "the fetch broke off"));
            }
        }
    }
}

/// Joins the fetch of a blob, or begins it.
fn join(shared: &Arc<Shared>, pool: &Arc<NamedPool>, blob: Blob, holders: &[Holder]) -> watch::Receiver<Fetch> {
    let which = (pool.pool.path().to_owned(), blob.digest);
    let mut fetches = lock(&shared.blobs.fetches);
    if let Some(sender) = fetches.get(&which) {
        return sender.subscribe();
    }
    let (sender, seen) = watch::channel(Fetch::UnderWay(0));
    fetches.insert(which.clone(), sender.clone());
    drop(fetches);
    let (shared, pool, holders) = (Arc::clone(shared), Arc::clone(pool), holders.to_vec());
    tokio::spawn(async move {
        let end = Ends { shared, which };
        let over = bring(&end.shared, &pool, blob, &holders, &sender).await;
        // First this: who comes after the end begins anew, and is not told how an earlier one ended.
        drop(end);
        sender.send_replace(over.map_or(Fetch::GivenUp, Fetch::Over));
    });
    seen
}

/// A fetch: when this is dropped, the next one who wants the blob begins anew, also after one that broke off.
struct Ends {
    shared: Arc<Shared>,
    which: Which,
}

impl Drop for Ends {
    fn drop(&mut self) {
        lock(&self.shared.blobs.fetches).remove(&self.which);
        self.shared.blobs.ended.notify_waiters();
    }
}

/// Brings a blob into a pool; `None` when nobody waits for it any more. However it ends, nothing half is left.
async fn bring(
    shared: &Arc<Shared>,
    pool: &Arc<NamedPool>,
    blob: Blob,
    holders: &[Holder],
    sender: &watch::Sender<Fetch>,
) -> Option<Result<(), Refusal>> {
    let _turn = tokio::select! {
        turn = shared.blobs.turns.acquire() => turn.ok()?,
        () = sender.closed() => return None,
    };
    if let Err(refusal) = has_room(pool, blob).await {
        return Some(Err(refusal));
    }
    let mut holders = holders;
    loop {
        let (pieces, taken) = mpsc::channel(PIECES_WAITING_MAX);
        let into = Arc::clone(pool);
        let writer = tokio::task::spawn_blocking(move || into.pool.receive_blob(blob, &mut Pieces::of(taken)));
        let mut feed = Feed {
            shared,
            blob,
            pieces,
            got: 0,
            why: vec![],
            from: String::new(),
            sender,
        };
        let given_up = tokio::select! {
            () = feed.all(holders) => false,
            () = sender.closed() => true,
        };
        let Feed {
            why, got, pieces, from, ..
        } = feed;
        // The writer comes to its end; one that has all keeps it, others remove what they have.
        drop(pieces);
        let failed = |why: &str| not_fetched(blob, &pool.name, why);
        return match writer.await {
            Ok(Ok(())) => {
                let (digest, pool) = (blob.digest, &pool.name);
                tracing::info!(%digest, %pool, from, "a blob was fetched");
                Some(Ok(()))
            }
            _ if given_up => None,
            Err(_) => Some(Err(failed("writing it broke off"))),
            // One of them lent other bytes: once more, from where the digest comes from.
            Ok(Err(error @ ReceiveError::Digest { .. })) if !holders.is_empty() => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a host lent other bytes than the blob's"
                );
                holders = &[];
                continue;
            }
            Ok(Err(ReceiveError::TooShort { .. })) if got < blob.size_bytes && !why.is_empty() => {
                Some(Err(failed(&why.join("; "))))
            }
            Ok(Err(error)) => Some(Err(failed(&chain(&error)))),
        };
    }
}

async fn has_room(pool: &Arc<NamedPool>, blob: Blob) -> Result<(), Refusal> {
    let failed = |why: &str| not_fetched(blob, &pool.name, why);
    let room = pool
        .run(image::Pool::capacity)
        .await
        .map_err(|error| failed(&error.to_string()))?;
    let room = room.map_err(|error| failed(&chain(&error)))?;
    if room.free_bytes >= blob.size_bytes {
        return Ok(());
    }
    let (needed, free) = (blob.size_bytes.div_ceil(1 << 20), room.free_bytes >> 20);
    let refusal = failed(&format!("it takes {needed} MiB and {free} MiB are free"));
    Err(Refusal {
        code: Code::NoCapacity,
        ..refusal.hint("free space there, or choose another pool or host")
    })
}

/// What brings the bytes of one blob, from one source after the other.
struct Feed<'f> {
    shared: &'f Arc<Shared>,
    blob: Blob,
    pieces: mpsc::Sender<Bytes>,
    got: u64,
    /// Why each source did not bring them.
    why: Vec<String>,
    /// Who brought the last of them.
    from: String,
    sender: &'f watch::Sender<Fetch>,
}

/// Why a source brought no more.
enum Cut {
    /// For people.
    Because(String),
    /// Whoever takes the bytes takes no more.
    NotTaken,
}

impl From<String> for Cut {
    fn from(why: String) -> Self {
        Self::Because(why)
    }
}

impl Feed<'_> {
    async fn all(&mut self, holders: &[Holder]) {
        let sources = holders.iter().map(Some).chain([None]);
        for holder in sources {
            for _ in 0..TRIES_MAX {
                let before = self.got;
                self.from = holder.map_or_else(|| "the controller".to_owned(), |holder| holder.host.to_string());
                let brought = match holder {
                    Some(holder) => self.borrow_from(*holder).await,
                    None => self.ask_controller().await,
                };
                match brought {
                    Err(Cut::NotTaken) => return,
                    Ok(()) if self.got == self.blob.size_bytes => return,
                    Ok(()) => {}
                    Err(Cut::Because(why)) => {
                        tracing::warn!(digest = %self.blob.digest, got = self.got, why, "a fetch was cut");
                        if self.got == before {
                            self.why.push(why);
                            break;
                        }
                    }
                }
            }
        }
    }

    async fn borrow_from(&mut self, holder: Holder) -> Result<(), Cut> {
        let from = |why: String| format!("host {} did not lend it: {why}", holder.host);
        let borrowed = peers::borrow(self.shared, holder, self.blob.digest, self.got).await;
        let (mut stream, size_bytes) = borrowed.map_err(|error| from(chain(&error)))?;
        if size_bytes != self.blob.size_bytes {
            return Err(from(format!("it has {size_bytes} bytes there, not {}", self.blob.size_bytes)).into());
        }
        while self.got < size_bytes {
            let mut piece = bytes::BytesMut::with_capacity(PIECE_BYTES);
            let read = timeout(SILENCE_MAX, stream.read_buf(&mut piece)).await;
            let read = read.map_err(|_| from("it fell silent".to_owned()))?;
            if read.map_err(|error| from(error.to_string()))? == 0 {
                return Err(from("the connection was cut".to_owned()).into());
            }
            self.pass(piece.freeze()).await?;
        }
        Ok(())
    }

    async fn ask_controller(&mut self) -> Result<(), Cut> {
        let mut body = open(self.shared, self.blob, self.got).await?;
        while let Some(bytes) = next_piece(&mut body).await? {
            self.pass(bytes).await?;
        }
        Ok(())
    }

    async fn pass(&mut self, bytes: Bytes) -> Result<(), Cut> {
        let before = self.got;
        self.got += bytes.len() as u64;
        self.pieces.send(bytes).await.map_err(|_| Cut::NotTaken)?;
        if self.got / TOLD_EVERY != before / TOLD_EVERY {
            self.sender.send_replace(Fetch::UnderWay(self.got));
        }
        Ok(())
    }
}

/// Asks the controller for a blob's bytes from the `from`th on.
async fn open(shared: &Shared, blob: Blob, from: u64) -> Result<Incoming, String> {
    let mut link = shared.link().ok_or("the controller is not connected")?;
    let mut request = Request::get(format!("{BLOBS_PATH}/{}", blob.digest));
    if from > 0 {
        request = request.header(header::RANGE, format!("bytes={from}-"));
    }
    let request = request.body(Empty::new().boxed()).map_err(|error| error.to_string())?;
    let answer = timeout(SILENCE_MAX, link.send_request(request))
        .await
        .map_err(|_| "the controller does not answer")?
        .map_err(|error| error.to_string())?;
    match answer.status() {
        StatusCode::OK if from == 0 => Ok(answer.into_body()),
        StatusCode::PARTIAL_CONTENT if from > 0 => Ok(answer.into_body()),
        StatusCode::NOT_FOUND => Err("the controller does not have it".to_owned()),
        status => Err(format!("the controller answered {status}")),
    }
}

async fn next_piece(body: &mut Incoming) -> Result<Option<Bytes>, String> {
    loop {
        let frame = timeout(SILENCE_MAX, body.frame()).await;
        let Some(frame) = frame.map_err(|_| "the controller fell silent")? else {
            return Ok(None);
        };
        if let Ok(bytes) = frame.map_err(|error| error.to_string())?.into_data() {
            return Ok(Some(bytes));
        }
    }
}

/// Has the controller send a blob, and a thread take it.
pub(crate) async fn streamed<T, F>(shared: &Shared, pool: &Arc<NamedPool>, blob: Blob, take: F) -> Result<T, Refusal>
where
    T: Send + 'static,
    F: FnOnce(&image::Pool, &mut Pieces) -> T + Send + 'static,
{
    let failed = |why: &str| not_fetched(blob, &pool.name, why);
    let mut body = open(shared, blob, 0).await.map_err(|why| failed(&why))?;
    let (pieces, taken) = mpsc::channel(PIECES_WAITING_MAX);
    let into = Arc::clone(pool);
    let writer = tokio::task::spawn_blocking(move || take(&into.pool, &mut Pieces::of(taken)));
    while let Some(bytes) = next_piece(&mut body).await.map_err(|why| failed(&why))? {
        if pieces.send(bytes).await.is_err() {
            break;
        }
    }
    drop(pieces);
    writer.await.map_err(|_| failed("writing it broke off"))
}

/// Gives the controller a copy of a blob of a pool, for hosts that need it when this one is away.
pub(crate) async fn give_back(shared: &Shared, pool: &Arc<NamedPool>, blob: Blob) -> Result<(), Refusal> {
    let failed = |why: &str| {
        let text = format!("blob {} was not copied to the controller: {why}", blob.digest);
        Refusal::new(Code::HostFailed, text)
    };
    for _ in 0..GIVE_TRIES_MAX {
        let mut link = shared.link().ok_or_else(|| failed("it is not connected"))?;
        let (pieces, body) = mpsc::channel(PIECES_WAITING_MAX);
        let request = Request::put(format!("{BLOBS_PATH}/{}", blob.digest))
            .header(header::CONTENT_LENGTH, blob.size_bytes)
            .body(body_of(body))
            .map_err(|error| failed(&error.to_string()))?;
        let from = Arc::clone(pool);
        let reader = tokio::task::spawn_blocking(move || read_all(&from.pool, blob.digest, &pieces));
        let answer = timeout(Duration::from_millis(IMPORT_MAX.0), link.send_request(request)).await;
        let answer = answer
            .map_err(|_| failed("it does not answer"))?
            .map_err(|error| failed(&error.to_string()))?;
        let (status, body) = (answer.status(), answer.into_body());
        let read = reader.await.map_err(|_| failed("reading it broke off"))?;
        match status {
            StatusCode::NO_CONTENT => return Ok(()),
            // tidy: sleep because nothing tells when it takes more again.
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => tokio::time::sleep(GIVE_AGAIN).await,
            status => {
                read.map_err(|why| failed(&why))?;
                let refusal = crate::session::problem_of(body).await;
                return Err(refusal.unwrap_or_else(|| failed(&format!("it answered {status}"))));
            }
        }
    }
    Err(failed("it has taken no more for too long"))
}

fn read_all(pool: &image::Pool, digest: Digest, to: &mpsc::Sender<Bytes>) -> Result<(), String> {
    let mut file = pool.open_blob(digest).map_err(|error| chain(&error))?;
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        let length = file.read(&mut piece).map_err(|error| error.to_string())?;
        piece.truncate(length);
        // Whoever takes no more says why.
        if length == 0 || to.blocking_send(piece.into()).is_err() {
            return Ok(());
        }
    }
}

/// Another host asks for a blob: its bytes, if the controller had it lent to that host. To all others it says the same.
pub(crate) async fn lend<S: AsyncWrite + Unpin>(
    shared: &Shared,
    to: HostId,
    digest: Digest,
    from: u64,
    stream: &mut S,
) -> Result<(), peers::LinkError> {
    let not_lent = |reason: &str| wire::Peer::NotLent {
        reason: reason.to_owned(),
    };
    let Some(pool) = shared
        .blobs
        .may_lend(to, digest)
        .await
        .and_then(|pool| shared.pool(pool))
    else {
        return peers::put(
            stream,
            &not_lent("the controller did not say that this blob may be lent to that host"),
        )
        .await;
    };
    let Ok(Ok(_turn)) = timeout(SILENCE_MAX, shared.blobs.lending.acquire()).await else {
        return peers::put(stream, &not_lent("it lends as much as it can")).await;
    };
    let opened = pool.run(move |pool| {
        let mut file = pool.open_blob(digest).map_err(|error| chain(&error))?;
        let size_bytes = file.metadata().map_err(|error| error.to_string())?.len();
        file.seek(SeekFrom::Start(from.min(size_bytes)))
            .map_err(|error| error.to_string())?;
        Ok::<_, String>((file, size_bytes))
    });
    let opened = opened
        .await
        .map_err(|error| error.to_string())
        .and_then(|opened| opened);
    let (file, size_bytes) = match opened {
        Ok(opened) => opened,
        Err(why) => return peers::put(stream, &not_lent(&why)).await,
    };
    peers::put(stream, &wire::Peer::Lent { size_bytes }).await?;
    let mut file = tokio::fs::File::from_std(file);
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let length = timeout(SILENCE_MAX, file.read(&mut piece)).await;
        let length = length.map_err(|_| peers::LinkError::Silent)??;
        let written = timeout(SILENCE_MAX, async {
            match length {
                0 => stream.shutdown().await,
                _ => stream.write_all(&piece[..length]).await,
            }
        });
        written.await.map_err(|_| peers::LinkError::Silent)??;
        if length == 0 {
            return Ok(());
        }
    }
}

/// A stream of which the answer's frame was read, and no byte more.
pub(crate) trait Lender: AsyncRead + Unpin + Send {}
impl<S: AsyncRead + Unpin + Send> Lender for S {}

pub(crate) fn not_fetched(blob: Blob, pool: &Name, why: &str) -> Refusal {
    let text = format!("blob {} was not fetched into pool {pool}: {why}", blob.digest);
    Refusal::new(Code::HostFailed, text)
}

/// Whether a pool has a blob.
pub(crate) async fn is_there(pool: &Arc<NamedPool>, blob: Blob) -> Result<bool, Refusal> {
    let failed = |why: &str| not_fetched(blob, &pool.name, why);
    let there = pool.run(move |pool| pool.blob_size(blob.digest)).await;
    let there = there.map_err(|error| failed(&error.to_string()))?;
    Ok(there.map_err(|error| failed(&chain(&error)))? == Some(blob.size_bytes))
}

/// What a channel brings, as a reader for a blocking thread.
pub(crate) struct Pieces {
    taken: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl Pieces {
    fn of(taken: mpsc::Receiver<Bytes>) -> Self {
        Self {
            taken,
            rest: Bytes::new(),
        }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            match self.taken.blocking_recv() {
                Some(bytes) => self.rest = bytes,
                None => return Ok(0),
            }
        }
        let length = self.rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.rest.split_to(length));
        Ok(length)
    }
}

#[cfg(test)]
#[path = "blobs_tests.rs"]
mod tests;

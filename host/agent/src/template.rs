//! Templates: their blobs are fetched from the controller into a pool, and disks vetted before anything is made from them.
//!
//! Invariant: an import deletes no blob, however it ends. Templates share blobs, also while they are imported; only the controller knows
//! which of them nobody has any more, and orders their end. A stranger's disk is no blob before it is converted.

use std::{
    collections::BTreeSet,
    io::Read,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use image::{ImportError, ImportLimits, ReceiveError};
use model::{
    Code, Digest, OperationId, PoolId, Refusal, Report, TemplateId,
    operation::Progress,
    order::{PoolBlobs, TemplateOrder, TemplateReport, TemplateVerb},
    storage::Format,
    template::{Blob, Content, Disk, IMPORT_MAX},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use crate::{
    blobs::{self, Pieces, is_there, not_fetched},
    shared::{NamedPool, Shared, lock},
};

/// Largest virtual disk of a template.
const DISK_BYTES_MAX: u64 = 2 << 40;
/// Largest file of an imported disk.
const DISK_FILE_BYTES_MAX: u64 = 256 << 30;
/// Longest conversion of an imported disk.
const CONVERT_MAX: Duration = Duration::from_secs(1200);
// The controller waits longer: a disk that comes after it gave up was converted for nothing.
const _: () = assert!(CONVERT_MAX.as_millis() < IMPORT_MAX.0 as u128);

/// Disks that one host takes in at once: each keeps a processor and the pool busy for minutes.
const IMPORTS_MAX: usize = 2;
/// How long a disk waits for its turn. With the longest conversion it is still within what the controller waits.
const TURN_MAX: Duration = Duration::from_secs(300);
const _: () = assert!(TURN_MAX.as_millis() + CONVERT_MAX.as_millis() < IMPORT_MAX.0 as u128);

/// Which order: the same one is carried out once at a time.
type Which = (TemplateId, OperationId);

/// The orders about templates that are being carried out.
#[derive(Debug, Default)]
pub(crate) struct Running(Mutex<BTreeSet<Which>>);

/// The turns of disks that are to be taken in.
#[derive(Debug)]
pub(crate) struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(IMPORTS_MAX))
    }
}

impl Turns {
    /// Waits for a turn, which lasts until what is returned is dropped.
    async fn begin(&self, within: Duration) -> Result<SemaphorePermit<'_>, Refusal> {
        let turn = timeout(within, self.0.acquire()).await;
        turn.ok().and_then(Result::ok).ok_or_else(|| {
            let text = format!("this host takes in {IMPORTS_MAX} disks at once, and none of them was done in time");
            Refusal::new(Code::Overloaded, text).hint("import it again when the others are done")
        })
    }
}

/// An order that is being carried out: until this is dropped, the same one is not begun again.
struct Run<'r>(&'r Running, Which);

impl Running {
    /// `None` while the same order runs.
    fn begin(&self, which: Which) -> Option<Run<'_>> {
        // Lazily: a run that is made is taken out again when it is dropped.
        lock(&self.0).insert(which).then(|| Run(self, which))
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).remove(&self.1);
    }
}

/// Carries out an order about a template and reports what became of it. One that comes again while it is carried out is answered
/// by the first.
pub(crate) async fn carry_out(shared: &Arc<Shared>, order: TemplateOrder) {
    let TemplateOrder {
        operation,
        template,
        pool,
        verb,
        ..
    } = order;
    let Some(_run) = shared.templates.begin((template, operation)) else {
        return;
    };
    let result = match verb {
        TemplateVerb::Fetch { content } => fetch(shared, operation, pool, content).await.map(Some),
        TemplateVerb::Drop { blobs, others } => {
            let first = PoolBlobs { pool, blobs };
            drop_blobs(shared, std::iter::once(first).chain(others))
                .await
                .map(|()| None)
        }
    };
    let (refused, content) = match result {
        Ok(content) => (None, content),
        Err(reason) => (Some(reason), None),
    };
    shared.reports.push(Report::Template(TemplateReport {
        operation,
        template,
        pool,
        refused,
        content: content.map(Box::new),
    }));
}

/// A pool of this host, by its id.
pub(crate) fn named(shared: &Shared, pool: PoolId) -> Result<Arc<NamedPool>, Refusal> {
    shared.pool(pool).ok_or_else(|| {
        Refusal::new(Code::HostFailed, format!("this host has no pool {pool}"))
            .hint("start its agent with --pool NAME=DIRECTORY for that pool")
    })
}

/// Fetches a template's blobs and takes its disk in; what it holds then.
async fn fetch(
    shared: &Arc<Shared>,
    operation: model::OperationId,
    pool: PoolId,
    mut content: Content,
) -> Result<Content, Refusal> {
    let into = named(shared, pool)?;
    let disk = content.disk.map(|disk| disk.blob);
    for blob in content.blobs().filter(|blob| Some(*blob) != disk).collect::<Vec<_>>() {
        shared.progress(operation, fetching(blob));
        blobs::fetch(shared, &into, blob, &[], |_| {}).await?;
    }
    if let Some(disk) = content.disk {
        let _turn = shared.imports.begin(TURN_MAX).await?;
        let taken = fetch_disk(shared, operation, &into, disk).await?;
        // What was uploaded is not what guests read, and this host may be away when another one needs that.
        let doing = "giving the controller a copy".to_owned();
        let progress = Progress {
            doing,
            remaining_bytes: Some(taken.blob.size_bytes),
            ..Progress::default()
        };
        shared.progress(operation, progress);
        if let Err(refusal) = blobs::give_back(shared, &into, taken.blob).await {
            // The template is whole here, and others fetch it from here as long as this host is there.
            tracing::warn!(%operation, why = refusal.message, "the controller has no copy of the template's disk");
        }
        content.disk = Some(taken);
    }
    Ok(content)
}

fn fetching(blob: Blob) -> Progress {
    Progress {
        doing: "fetching".to_owned(),
        remaining_bytes: Some(blob.size_bytes),
        ..Progress::default()
    }
}

/// Fetches a stranger's disk and takes it in; nothing is left of it as it came.
async fn fetch_disk(
    shared: &Arc<Shared>,
    operation: model::OperationId,
    into: &Arc<NamedPool>,
    disk: Disk,
) -> Result<Disk, Refusal> {
    let vetting = {
        let shared = Arc::clone(shared);
        move || {
            let doing = "vetting the disk".to_owned();
            let progress = Progress {
                doing,
                ..Progress::default()
            };
            shared.progress(operation, progress);
        }
    };
    if is_there(into, disk.blob).await? {
        vetting();
        let pool = Arc::clone(into);
        let converted = tokio::task::spawn_blocking(move || {
            let source = pool.pool.blob_path(disk.blob.digest);
            convert(&pool.pool, &source, disk)
        });
        return converted
            .await
            .map_err(|_| Refusal::new(Code::HostFailed, "vetting the disk broke off"))?;
    }
    shared.progress(operation, fetching(disk.blob));
    let name = into.name.clone();
    let take = move |pool: &image::Pool, pieces: &mut Pieces| {
        take_in(pool, disk, pieces, vetting).map_err(|error| match error {
            TakeError::Receive(error) => not_fetched(disk.blob, &name, &chain(&error)),
            TakeError::Refused(refusal) => refusal,
        })
    };
    blobs::streamed(shared, into, disk.blob, take).await?
}

/// Why a disk was not taken in. Nothing of it is left.
#[derive(Debug)]
enum TakeError {
    Receive(ReceiveError),
    Refused(Refusal),
}

/// Receives a disk from `stream`, beside the pool's blobs, and converts it; `whole` is called in between.
fn take_in(pool: &image::Pool, disk: Disk, stream: &mut dyn Read, whole: impl FnOnce()) -> Result<Disk, TakeError> {
    let limit = disk.blob.size_bytes;
    let mut incoming = pool.incoming(limit).map_err(|error| TakeError::Receive(error.into()))?;
    incoming.read_from(stream).map_err(TakeError::Receive)?;
    incoming.check(disk.blob).map_err(TakeError::Receive)?;
    whole();
    convert(pool, &incoming.path(), disk).map_err(TakeError::Refused)
}

/// Vets a disk and converts it, so that nothing of a stranger's structure survives.
fn convert(pool: &image::Pool, source: &Path, disk: Disk) -> Result<Disk, Refusal> {
    let limits = ImportLimits {
        virtual_bytes: DISK_BYTES_MAX,
        output_bytes: DISK_FILE_BYTES_MAX,
        deadline: CONVERT_MAX,
    };
    let imported = pool
        .import(source, disk.format, limits, &mut |_, _| {})
        .map_err(|error| match error {
            ImportError::Refused(why) => Refusal::new(Code::InvalidInput, format!("the disk was refused: {why}")),
            other => Refusal::new(
                Code::HostFailed,
                format!("the disk was not taken in: {}", chain(&other)),
            ),
        })?;
    Ok(Disk {
        blob: imported.blob,
        format: Format::Qcow2,
        size_bytes: imported.virtual_bytes,
    })
}

async fn drop_blobs(shared: &Shared, of: impl Iterator<Item = PoolBlobs>) -> Result<(), Refusal> {
    for PoolBlobs { pool, blobs } in of {
        let from = named(shared, pool)?;
        for digest in blobs {
            shared.blobs.settled(&from, digest).await;
            delete_blob(&from, digest).await?;
        }
    }
    Ok(())
}

async fn delete_blob(from: &Arc<NamedPool>, digest: Digest) -> Result<(), Refusal> {
    let failed = |why: String| {
        let text = format!("blob {digest} was not removed from pool {}: {why}", from.name);
        Refusal::new(Code::HostFailed, text)
    };
    let deleted = from.run(move |pool| pool.delete_blob(digest)).await;
    let deleted = deleted.map_err(|error| failed(error.to_string()))?;
    deleted.map(drop).map_err(|error| failed(chain(&error)))
}

pub(crate) use model::story as chain;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use std::time::Duration;

    use model::{
        Code, Digest, OperationId, TemplateId,
        storage::Format,
        template::{Blob, Disk},
    };
    use sha2::{Digest as _, Sha256};
    use uuid::Uuid;

    use super::{IMPORTS_MAX, Running, TakeError, Turns, take_in};

    /// A raw disk of 1 MiB, whose conversion has another digest.
    fn raw_disk() -> (Vec<u8>, Disk) {
        let bytes = [b"godwit".repeat(100), vec![0; (1 << 20) - 600]].concat();
        let blob = Blob {
            digest: Digest(Sha256::digest(&bytes).into()),
            size_bytes: 1 << 20,
        };
        let disk = Disk {
            blob,
            format: Format::Raw,
            size_bytes: 1 << 20,
        };
        (bytes, disk)
    }

    #[test]
    fn an_import_leaves_the_blobs_of_others_alone_however_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let pool = image::Pool::open(dir.path()).unwrap();
        let (bytes, disk) = raw_disk();
        // The same bytes are another template's.
        pool.receive_blob(disk.blob, &mut bytes.as_slice()).unwrap();
        let taken = take_in(&pool, disk, &mut bytes.as_slice(), || {}).unwrap();
        assert_ne!(taken.blob.digest, disk.blob.digest);
        let both = pool.blobs().unwrap();
        assert!(both.contains(&disk.blob.digest) && both.contains(&taken.blob.digest));
        // A disk that is refused, and one that is not what was announced.
        let lying = Disk {
            format: Format::Qcow2,
            ..disk
        };
        let refused = take_in(&pool, lying, &mut bytes.as_slice(), || {});
        assert!(matches!(refused, Err(TakeError::Refused(why)) if why.code == Code::InvalidInput));
        let other = vec![1; 1 << 20];
        let refused = take_in(&pool, disk, &mut other.as_slice(), || {});
        assert!(matches!(refused, Err(TakeError::Receive(_))));
        assert_eq!(pool.blobs().unwrap(), both);
    }

    #[test]
    fn a_strangers_disk_is_no_blob() {
        let dir = tempfile::tempdir().unwrap();
        let pool = image::Pool::open(dir.path()).unwrap();
        let (bytes, disk) = raw_disk();
        let mut whole = false;
        let taken = take_in(&pool, disk, &mut bytes.as_slice(), || {
            whole = true;
            assert_eq!(pool.blobs().unwrap(), []);
        })
        .unwrap();
        assert!(whole);
        assert_eq!(pool.blobs().unwrap(), [taken.blob.digest]);
    }

    #[tokio::test]
    async fn disks_are_taken_in_a_few_at_once_and_the_others_wait_so_long_and_no_longer() {
        let (turns, soon) = (Turns::default(), Duration::from_millis(10));
        let mut held = vec![];
        for _ in 0..IMPORTS_MAX {
            held.push(turns.begin(soon).await.unwrap());
        }
        assert_eq!(turns.begin(soon).await.unwrap_err().code, Code::Overloaded);
        held.pop();
        drop(turns.begin(soon).await.unwrap());
    }

    #[test]
    fn an_order_runs_once_at_a_time_on_each_host() {
        let id = |n| Uuid::from_u128(n);
        let (here, there) = (Running::default(), Running::default());
        let which = (TemplateId(id(2)), OperationId(id(3)));
        let run = here.begin(which).unwrap();
        assert!(here.begin(which).is_none());
        assert!(
            there.begin(which).is_some(),
            "another agent in this process is another host"
        );
        assert!(here.begin((which.0, OperationId(id(4)))).is_some());
        drop(run);
        assert!(here.begin(which).is_some());
    }
}

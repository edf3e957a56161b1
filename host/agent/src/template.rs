//! Templates: their blobs are fetched from the controller into a pool, and disks vetted before anything is made from them.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode};
use image::{ImportError, ImportLimits};
use model::{
    Code, Digest, OperationId, PoolId, Refusal, Report, TemplateId,
    operation::Progress,
    order::{TemplateOrder, TemplateReport, TemplateVerb},
    storage::Format,
    template::{Blob, Content, Disk, IMPORT_MAX},
};
use tokio::sync::mpsc;
use wire::session::BLOBS_PATH;

use crate::shared::{NamedPool, Shared, lock};

/// Pieces on their way from the network to the disk.
const PIECES_WAITING_MAX: usize = 64;
/// After this long without a byte a fetch is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Largest virtual disk of a template.
const DISK_BYTES_MAX: u64 = 2 << 40;
/// Largest file of an imported disk.
const DISK_FILE_BYTES_MAX: u64 = 256 << 30;
/// Longest conversion of an imported disk.
const CONVERT_MAX: Duration = Duration::from_secs(1200);
// The controller waits longer: a disk that comes after it gave up was converted for nothing.
const _: () = assert!(CONVERT_MAX.as_millis() < IMPORT_MAX.0 as u128);

/// Which order: the same one is carried out once at a time.
type Which = (TemplateId, OperationId);

/// The orders about templates that are being carried out.
#[derive(Debug, Default)]
pub(crate) struct Running(Mutex<BTreeSet<Which>>);

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
        TemplateVerb::Drop { blobs } => drop_blobs(shared, pool, blobs).await.map(|()| None),
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
        content,
    }));
}

/// A pool of this host, by its id.
pub(crate) fn named(shared: &Shared, pool: PoolId) -> Result<Arc<NamedPool>, Refusal> {
    shared.pool(pool).ok_or_else(|| {
        Refusal::new(Code::HostFailed, format!("this host has no pool {pool}"))
            .hint("start its agent with --pool NAME=DIRECTORY for that pool")
    })
}

/// Fetches a template's blobs and takes its disk in; what it holds then. What was fetched for nothing is removed.
async fn fetch(
    shared: &Arc<Shared>,
    operation: model::OperationId,
    pool: PoolId,
    content: Content,
) -> Result<Content, Refusal> {
    let into = named(shared, pool)?;
    let mut fetched = vec![];
    let taken = fetch_into(shared, operation, &into, content, &mut fetched).await;
    if taken.is_err() {
        for digest in fetched {
            if let Err(why) = delete_blob(&into, digest).await {
                tracing::warn!(%digest, why = why.message, "a refused blob was not removed");
            }
        }
    }
    taken
}

/// As [`fetch`]; `fetched` has what was not there before, however it ends.
async fn fetch_into(
    shared: &Arc<Shared>,
    operation: model::OperationId,
    into: &Arc<NamedPool>,
    mut content: Content,
    fetched: &mut Vec<Digest>,
) -> Result<Content, Refusal> {
    for blob in content.blobs().collect::<Vec<_>>() {
        let progress = Progress {
            doing: "fetching".to_owned(),
            remaining_bytes: Some(blob.size_bytes),
            ..Progress::default()
        };
        shared.progress(operation, progress);
        if fetch_blob(shared, into, blob).await? {
            fetched.push(blob.digest);
        }
    }
    if let Some(disk) = content.disk {
        shared.progress(
            operation,
            Progress {
                doing: "vetting the disk".to_owned(),
                ..Progress::default()
            },
        );
        let pool = Arc::clone(into);
        let converted = tokio::task::spawn_blocking(move || take_in(&pool, disk)).await;
        content.disk = Some(converted.map_err(|_| Refusal::new(Code::HostFailed, "vetting the disk broke off"))??);
    }
    Ok(content)
}

/// Vets a disk and converts it, so that nothing of a stranger's structure survives. A blob that is our own conversion already stays.
fn take_in(pool: &NamedPool, disk: Disk) -> Result<Disk, Refusal> {
    let limits = ImportLimits {
        virtual_bytes: DISK_BYTES_MAX,
        output_bytes: DISK_FILE_BYTES_MAX,
        deadline: CONVERT_MAX,
    };
    let source = pool.pool.blob_path(disk.blob.digest);
    let imported = pool
        .pool
        .import(&source, disk.format, limits, &mut |_, _| {})
        .map_err(|error| match error {
            ImportError::Refused(why) => Refusal::new(Code::InvalidInput, format!("the disk was refused: {why}")),
            other => Refusal::new(
                Code::HostFailed,
                format!("the disk was not taken in: {}", chain(&other)),
            ),
        })?;
    if imported.blob.digest != disk.blob.digest {
        pool.pool
            .delete_blob(disk.blob.digest)
            .map_err(|error| Refusal::new(Code::HostFailed, chain(&error)))?;
    }
    Ok(Disk {
        blob: imported.blob,
        format: Format::Qcow2,
        size_bytes: imported.virtual_bytes,
    })
}

/// Fetches a blob that the pool lacks; whether it did.
pub(crate) async fn fetch_blob(shared: &Arc<Shared>, pool: &Arc<NamedPool>, blob: Blob) -> Result<bool, Refusal> {
    let failed = |why: String| {
        Refusal::new(
            Code::HostFailed,
            format!("blob {} was not fetched into pool {}: {why}", blob.digest, pool.name),
        )
    };
    let there = pool.run(move |pool| pool.blob_size(blob.digest)).await;
    let there = there.map_err(|error| failed(error.to_string()))?;
    if there.map_err(|error| failed(chain(&error)))? == Some(blob.size_bytes) {
        return Ok(false);
    }
    let mut link = shared
        .link()
        .ok_or_else(|| failed("the controller is not connected".to_owned()))?;
    let request = Request::get(format!("{BLOBS_PATH}/{}", blob.digest))
        .body(Empty::new().boxed())
        .map_err(|error| failed(error.to_string()))?;
    let answer = tokio::time::timeout(SILENCE_MAX, link.send_request(request))
        .await
        .map_err(|_| failed("the controller does not answer".to_owned()))?
        .map_err(|error| failed(error.to_string()))?;
    if answer.status() != StatusCode::OK {
        return Err(failed(format!("the controller answered {}", answer.status())));
    }
    let (pieces, taken) = mpsc::channel(PIECES_WAITING_MAX);
    let into = Arc::clone(pool);
    let writer = tokio::task::spawn_blocking(move || {
        into.pool.receive_blob(
            blob,
            &mut Pieces {
                taken,
                rest: bytes::Bytes::new(),
            },
        )
    });
    let mut body = answer.into_body();
    loop {
        let frame = tokio::time::timeout(SILENCE_MAX, body.frame())
            .await
            .map_err(|_| failed("the controller fell silent".to_owned()))?;
        let Some(frame) = frame else { break };
        if let Ok(bytes) = frame.map_err(|error| failed(error.to_string()))?.into_data()
            && pieces.send(bytes).await.is_err()
        {
            break;
        }
    }
    drop(pieces);
    match writer.await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) => Err(failed(chain(&error))),
        Err(_) => Err(failed("writing it broke off".to_owned())),
    }
}

/// What a channel brings, as a reader for a blocking thread.
struct Pieces {
    taken: mpsc::Receiver<bytes::Bytes>,
    rest: bytes::Bytes,
}

impl std::io::Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            match self.taken.blocking_recv() {
                Some(bytes) => self.rest = bytes,
                None => return Ok(0),
            }
        }
        let n = (&self.rest[..]).read(buffer)?;
        bytes::Buf::advance(&mut self.rest, n);
        Ok(n)
    }
}

async fn drop_blobs(shared: &Shared, pool: PoolId, blobs: Vec<Digest>) -> Result<(), Refusal> {
    let from = named(shared, pool)?;
    for digest in blobs {
        delete_blob(&from, digest).await?;
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

/// An error with its causes, each once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use model::{OperationId, TemplateId};
    use uuid::Uuid;

    use super::Running;

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

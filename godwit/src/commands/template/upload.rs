//! Uploading files as blobs: read twice, piece by piece, never held in memory.

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use model::{Digest, template::Blob};
use sha2::{Digest as _, Sha256};
use tokio::{fs::File, io::AsyncReadExt as _};

use crate::{
    client::{Body, Client},
    exit::{Exit, Failure},
    out::{live::Live, units::show_bytes},
};

const PIECE_BYTES: usize = 256 << 10;

/// Uploads a file, unless the server has its bytes; the blob that it is.
pub(super) async fn upload(client: &Client, path: &Path) -> Result<Blob, Failure> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let live = Live::new(&name);
    let unreadable = |error: io::Error| {
        Failure::new(Exit::Failed, format!("cannot read {}: {error}", path.display()))
            .hint("check the path and its permissions")
    };
    let blob = digest(path, &live).await.map_err(unreadable)?;
    if client.has_blob(blob.digest, blob.size_bytes).await? {
        return Ok(blob);
    }
    let file = File::open(path).await.map_err(unreadable)?;
    let live = std::sync::Arc::new(live);
    let body = pieces(file, path.to_owned(), blob.size_bytes, live);
    client.put_blob(blob.digest, blob.size_bytes, body).await?;
    Ok(blob)
}

async fn digest(path: &Path, live: &Live) -> io::Result<Blob> {
    let mut file = File::open(path).await?;
    if !file.metadata().await?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let (mut hash, mut piece, mut size_bytes) = (Sha256::new(), vec![0; PIECE_BYTES], 0);
    loop {
        let count = file.read(&mut piece).await?;
        if count == 0 {
            break;
        }
        hash.update(&piece[..count]);
        size_bytes += count as u64;
        live.say(&format!("hashing · {}", show_bytes(size_bytes)));
    }
    Ok(Blob {
        digest: Digest(hash.finalize().into()),
        size_bytes,
    })
}

/// The file as a body, read as fast as it is taken. The line shows what went and what remains.
fn pieces(file: File, path: PathBuf, size_bytes: u64, live: std::sync::Arc<Live>) -> Body {
    // Not beyond the announced length, should the file grow.
    let from = file.take(size_bytes);
    let pieces = stream::try_unfold((from, 0u64), move |(mut file, sent)| {
        let (live, path) = (live.clone(), path.clone());
        async move {
            let mut piece = vec![0; PIECE_BYTES];
            let count = file.read(&mut piece).await?;
            if count == 0 && sent < size_bytes {
                return Err(io::Error::other(format!("{} became shorter", path.display())));
            }
            if count == 0 {
                return Ok(None);
            }
            piece.truncate(count);
            let sent = sent + count as u64;
            live.say(&format!(
                "uploading · {} moved · {} remaining",
                show_bytes(sent),
                show_bytes(size_bytes - sent)
            ));
            Ok(Some((Frame::data(Bytes::from(piece)), (file, sent))))
        }
    });
    StreamBody::new(pieces).boxed_unsync()
}

//! Idempotency keys: the same request is the same one, and another with its key is refused, whatever happened in between.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use bytes::Bytes;
use controller::SubmitOptions;
use futures_util::stream;
use model::{
    Code, Command, Digest, OperationId, Outcome, Refusal,
    command::IdempotencyKey,
    name::Reference,
    template::{Blob, Boot, Content, Seed},
};
use sha2::{Digest as _, Sha256};
use support::{Cell, Fault, facts};
use uuid::Uuid;

const RUN: Uuid = Uuid::from_u128(77);
const KERNEL: &[u8] = b"a kernel";

fn blob(bytes: &[u8]) -> Blob {
    Blob {
        digest: Digest(Sha256::digest(bytes).into()),
        size_bytes: bytes.len() as u64,
    }
}

fn template(name: &str) -> Command {
    Command::CreateTemplate {
        name: name.parse().unwrap(),
        content: Content {
            boot: Boot::Direct {
                kernel: blob(KERNEL),
                initrd: blob(KERNEL),
                cmdline: "console=ttyS0".to_owned(),
            },
            disk: None,
            memory_mib_min: 64,
            seed: Seed::None,
        },
    }
}

/// A cell with a host that sees a pool, and the blob of `template`.
async fn cell() -> Cell {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
    let Blob { digest, size_bytes } = blob(KERNEL);
    let pieces = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(KERNEL))]);
    cell.handle
        .put_blob(&cell.admin(), digest, size_bytes, pieces)
        .await
        .unwrap();
    cell
}

async fn keyed(cell: &Cell, command: Command, body: u8) -> Result<OperationId, Refusal> {
    let options = SubmitOptions {
        key: Some(IdempotencyKey {
            key: "once".to_owned(),
            body_hash: [body; 32],
        }),
        ..SubmitOptions::default()
    };
    match cell.handle.submit(cell.admin(), command, options).await? {
        Outcome::Operation(operation) => Ok(operation.id),
        other => panic!("{other:?}"),
    }
}

/// The first request is answered again, another with its key is refused.
async fn holds(cell: &Cell, first: OperationId) {
    assert_eq!(keyed(cell, template("micro"), 1).await.unwrap(), first);
    let refusal = keyed(cell, template("other"), 2).await.unwrap_err();
    assert_eq!(refusal.code, Code::KeyReused, "{refusal}");
}

#[tokio::test]
async fn a_key_stands_for_its_first_request_after_a_restart_and_after_a_failed_commit() {
    let mut cell = cell().await;
    let first = keyed(&cell, template("micro"), 1).await.unwrap();
    holds(&cell, first).await;
    cell.crash().await;
    holds(&cell, first).await;
    // What the store refuses has the world loaded anew, as after a failed disk.
    cell.storage.set(Fault::Refuse);
    let set = Command::SetSchedulable {
        host: "h1".parse::<Reference>().unwrap(),
        schedulable: false,
    };
    let refused = cell.handle.submit(cell.admin(), set, SubmitOptions::default()).await;
    assert!(refused.is_err());
    holds(&cell, first).await;
}

#[tokio::test]
async fn a_request_about_a_blob_is_answered_again_after_the_blob_was_swept() {
    let cell = cell().await;
    let first = keyed(&cell, template("micro"), 1).await.unwrap();
    std::fs::remove_dir_all(cell.state().blobs()).unwrap();
    std::fs::create_dir(cell.state().blobs()).unwrap();
    holds(&cell, first).await;
}

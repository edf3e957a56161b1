//! Writes a store of the present schema with a row of every kind: `cargo run -p store --example write_fixture FILE`. Run it when a
//! schema is released, into `control/store/tests/fixtures`; the fixture of a released schema is never written again.

use std::{error::Error, fs};

use sqlx::{Connection as _, SqliteConnection};
use store::Store;

#[path = "../tests/support/mod.rs"]
mod support;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let to = std::env::args_os().nth(1).ok_or("name the file to write")?;
    let dir = tempfile::tempdir()?;
    let (store, _) = Store::open(dir.path()).await?;
    store.commit(support::put(support::world_v3())).await?;
    drop(store);
    let path = dir.path().join("cell.sqlite");
    let mut raw = SqliteConnection::connect(path.to_str().ok_or("the temporary directory is not UTF-8")?).await?;
    // All of it into the one file.
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
        .fetch_all(&mut raw)
        .await?;
    raw.close().await?;
    fs::copy(&path, to)?;
    Ok(())
}

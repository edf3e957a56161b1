//! The database file: its lock, its connections and their settings, and reading the world from it.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use model::{Epoch, Row, id::Sequence};
use sqlx::{
    ConnectOptions as _, Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous},
};

use crate::{
    LoadError, Loaded, OpenError,
    schema::{self, BODY_VERSION},
    table::{CHUNKS, Table},
};

const DATABASE_FILE: &str = "cell.sqlite";
const LOCK_FILE: &str = "cell.lock";
/// Prepared statements kept: those for each table and chunk, and the few others.
const STATEMENTS_MAX: usize = 2 * Table::ALL.len() * CHUNKS.len() + 16;
/// How long a connection waits for another one of this process; nothing else has the database open.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Takes the directory for this process; held as long as the file is open.
pub(crate) fn lock(dir: &Path) -> Result<File, OpenError> {
    let directory = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Directory { path, source }
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(directory(dir))?;
    let path = dir.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&path).map_err(directory(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(source)) => return Err(OpenError::Directory { path, source }),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let read = std::io::Read::by_ref(&mut file).take(32).read_to_string(&mut holder);
            let known = read.is_ok() && holder.trim().parse::<u32>().is_ok();
            let holder = if known {
                format!("process {}", holder.trim())
            } else {
                "another process".to_owned()
            };
            return Err(OpenError::InUse {
                dir: dir.to_owned(),
                holder,
            });
        }
    }
    // The number is for the message above only; a full disk must not keep the store from opening for reading.
    let _ = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

/// Opens the writing and the reading connection, checks the file, and brings its schema up to date.
pub(crate) async fn connect(dir: &Path) -> Result<(SqliteConnection, SqliteConnection), OpenError> {
    let path = dir.join(DATABASE_FILE);
    // Made here, so that only we can read it; SQLite gives its companions the same mode.
    let made = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    made.map_err(|source| OpenError::Directory {
        path: path.clone(),
        source,
    })?;
    let database = |source| OpenError::Database {
        dir: dir.to_owned(),
        source,
    };
    let mut writer = SqliteConnection::connect_with(&options(&path))
        .await
        .map_err(|error| damage(dir, error))?;
    let findings: Vec<String> = sqlx::query_scalar("PRAGMA quick_check(1)")
        .fetch_all(&mut writer)
        .await
        .map_err(|error| damage(dir, error))?;
    if let Some(finding) = findings.into_iter().find(|finding| finding != "ok") {
        return Err(OpenError::Damaged {
            dir: dir.to_owned(),
            finding,
        });
    }
    schema::upgrade(&mut writer)
        .await
        .map_err(|error| OpenError::from_schema(dir.to_owned(), error))?;
    let reader = options(&path).pragma("query_only", "ON");
    let reader = SqliteConnection::connect_with(&reader).await.map_err(database)?;
    Ok((writer, reader))
}

fn options(path: &PathBuf) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        .statement_cache_capacity(STATEMENTS_MAX)
        .disable_statement_logging()
}

/// What SQLite says of a file that is no database, or a broken one, told apart from other failures.
fn damage(dir: &Path, source: sqlx::Error) -> OpenError {
    const SQLITE_CORRUPT: i64 = 11;
    const SQLITE_NOTADB: i64 = 26;
    let code = source
        .as_database_error()
        .and_then(|e| e.code())
        .and_then(|code| code.parse::<i64>().ok());
    match code.map(|code| code & 0xff) {
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => OpenError::Damaged {
            dir: dir.to_owned(),
            finding: source
                .as_database_error()
                .map(|e| e.message().to_owned())
                .unwrap_or_default(),
        },
        _ => OpenError::Database {
            dir: dir.to_owned(),
            source,
        },
    }
}

/// Reads the world as it was last committed.
pub(crate) async fn load(connection: &mut SqliteConnection, epoch: Epoch) -> Result<Loaded, LoadError> {
    // One transaction: one state of all tables.
    let mut transaction = connection.begin().await?;
    let mut rows = Vec::new();
    for table in Table::ALL {
        let Some(sql) = table.load() else { continue };
        let mut found = sqlx::query(sql).fetch(&mut *transaction);
        while let Some(row) = found.try_next().await? {
            rows.push(decode(table, &row)?);
        }
    }
    let last: Option<i64> = sqlx::query_scalar("SELECT MAX(sequence) FROM notice")
        .fetch_one(&mut *transaction)
        .await?;
    transaction.rollback().await?;
    Ok(Loaded {
        epoch,
        rows,
        last_notice: Sequence(unsigned(last.unwrap_or(0))),
    })
}

/// Reads a row's body from the columns `body_version` and `body`.
pub(crate) fn decode(table: Table, row: &SqliteRow) -> Result<Row, LoadError> {
    let found: i64 = row.try_get("body_version")?;
    if found > BODY_VERSION {
        return Err(LoadError::Newer {
            table: table.name(),
            found,
        });
    }
    let body: &str = row.try_get("body")?;
    table.decode(body).map_err(|source| LoadError::Row {
        table: table.name(),
        source,
    })
}

/// Numbers are stored non-negative.
pub(crate) fn unsigned(stored: i64) -> u64 {
    u64::try_from(stored).unwrap_or(0)
}

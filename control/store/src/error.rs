//! What can go wrong with the store, one enum for each operation.

use std::{io, path::PathBuf};

use crate::{
    schema::{SCHEMA_VERSION, SchemaError},
    table::EncodeError,
};

/// Why the store did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory could not be made or used.
    #[error("cannot use {} for the store; check that it exists, is writable and has space", path.display())]
    Directory {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("the store in {} is in use by {holder}; stop that one, or use another directory", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Who, as far as is known.
        holder: String,
    },
    /// A newer program wrote it.
    #[error(
        "the store in {} is of schema {found}, newer than this program's {SCHEMA_VERSION}; use the newer program, or \
         restore a backup that was made before the upgrade", dir.display()
    )]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// Its schema.
        found: i64,
    },
    /// The database file is damaged.
    #[error("the store in {} is damaged ({finding}); restore a backup", dir.display())]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// What the check found first.
        finding: String,
    },
    /// The world could not be read.
    #[error("cannot read the store in {}", dir.display())]
    Load {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// The database refused.
    #[error("cannot open the database in {}; check the directory's permissions and space", dir.display())]
    Database {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
}

impl OpenError {
    pub(crate) fn from_schema(dir: PathBuf, error: SchemaError) -> Self {
        match error {
            SchemaError::Newer { found } => Self::Newer { dir, found },
            SchemaError::Sql(source) => Self::Database { dir, source },
        }
    }
}

/// Why rows could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A row does not read as what its table holds.
    #[error("a row of table {table} does not read")]
    Row {
        /// The table.
        table: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A row was written by a newer program.
    #[error("a row of table {table} has form {found}, newer than this program knows; use the newer program")]
    Newer {
        /// The table.
        table: &'static str,
        /// The form.
        found: i64,
    },
    /// The database refused.
    #[error("the database refused a read")]
    Database(#[from] sqlx::Error),
}

/// Why a batch was not committed. Nothing of it was written, except after [`CommitError::ReadOnly`], where that is not
/// known until [`crate::Store::reload`] has read what is there.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Another controller leads now; this one may write nothing any more.
    #[error("another controller leads now; this one has stopped writing")]
    Deposed,
    /// The world this batch was decided on is older than the stored one.
    #[error("{table} {key} is newer in the store than in memory; the batch was dropped, reload the world")]
    Stale {
        /// The table.
        table: &'static str,
        /// The row.
        key: String,
    },
    /// The batch breaks a promise of the model: a name, MAC or address twice, or a reference to nothing.
    #[error("the batch breaks a promise of the store ({constraint}); it was dropped, reload the world")]
    Conflict {
        /// Which, in the database's words.
        constraint: String,
    },
    /// A row has no stored form.
    #[error("a row of table {table} cannot be stored; the batch was dropped")]
    Encode {
        /// The table.
        table: &'static str,
        /// Why.
        #[source]
        source: EncodeError,
    },
    /// The disk is full or fails. Reads go on; writes are refused until [`crate::Store::reload`] succeeds.
    #[error("the store is read-only: {reason}; free space or repair the disk under {}", dir.display())]
    ReadOnly {
        /// The directory.
        dir: PathBuf,
        /// What the database said.
        reason: String,
    },
}

/// What a database error means for the one who writes.
pub(crate) enum Meaning {
    Constraint(String),
    Failing(String),
}

const SQLITE_CONSTRAINT: i64 = 19;
const SQLITE_FULL: i64 = 13;

pub(crate) fn meaning(error: &sqlx::Error) -> Meaning {
    let sqlx::Error::Database(database) = error else {
        return Meaning::Failing(error.to_string());
    };
    // The low byte of an extended result code is the primary one.
    let code = database
        .code()
        .and_then(|code| code.parse::<i64>().ok())
        .map(|code| code & 0xff);
    match code {
        Some(SQLITE_CONSTRAINT) => Meaning::Constraint(database.message().to_owned()),
        Some(SQLITE_FULL) => Meaning::Failing("the disk is full".to_owned()),
        _ => Meaning::Failing(database.message().to_owned()),
    }
}

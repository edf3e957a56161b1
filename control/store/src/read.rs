//! What is read from the store while the cell runs: what the world in memory does not hold.

use model::{
    AuditEntry, AuditId, Notice, Operation, OperationId, ProjectId, Row,
    audit::AuditFilter,
    change::Answer,
    id::Sequence,
    query::{Listing, Page},
};
use sqlx::{AssertSqlSafe, SqliteConnection, sqlite::SqliteRow};

use crate::{
    LoadError, NoticePage,
    database::{decode, unsigned},
    table::Table,
};

pub(crate) async fn notices_after(
    connection: &mut SqliteConnection,
    after: Sequence,
    limit: usize,
) -> Result<NoticePage, LoadError> {
    let Ok(after_number) = i64::try_from(after.0) else {
        return Ok(NoticePage {
            notices: Vec::new(),
            missed: false,
        });
    };
    let oldest: Option<i64> = sqlx::query_scalar("SELECT MIN(sequence) FROM notice")
        .fetch_one(&mut *connection)
        .await?;
    let sql = "SELECT body_version, body FROM notice WHERE sequence > $1 ORDER BY sequence LIMIT $2";
    let rows = sqlx::query(sql)
        .bind(after_number)
        .bind(bounded(limit))
        .fetch_all(&mut *connection)
        .await?;
    let notices = rows.iter().map(notice).collect::<Result<_, _>>()?;
    let missed = oldest.is_some_and(|oldest| unsigned(oldest) > after.0.saturating_add(1));
    Ok(NoticePage { notices, missed })
}

pub(crate) async fn operations(
    connection: &mut SqliteConnection,
    project: Option<ProjectId>,
    page: Page,
) -> Result<Listing<Operation>, LoadError> {
    // UUIDv7: the order of ids is the order of making.
    let limit = page.limit.clamp(1, Page::LIMIT_MAX);
    let before = page.after.map_or_else(|| "g".to_owned(), |id| id.to_string()); // "g" is after every hexadecimal digit
    let rows = match project {
        Some(project) => {
            let sql = "SELECT body_version, body FROM operation WHERE project_id = $1 AND id < $2 \
                       ORDER BY id DESC LIMIT $3";
            let query = sqlx::query(sql)
                .bind(project.to_string())
                .bind(before)
                .bind(bounded(limit + 1));
            query.fetch_all(&mut *connection).await?
        }
        None => {
            let sql = "SELECT body_version, body FROM operation WHERE id < $1 ORDER BY id DESC LIMIT $2";
            sqlx::query(sql)
                .bind(before)
                .bind(bounded(limit + 1))
                .fetch_all(&mut *connection)
                .await?
        }
    };
    let mut items = rows.iter().map(operation_row).collect::<Result<Vec<_>, _>>()?;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|operation| operation.id.0);
    Ok(Listing { items, next })
}

/// Times are bounds of ids, so that each question is one range of one index.
pub(crate) async fn audit(
    connection: &mut SqliteConnection,
    filter: &AuditFilter,
    page: Page,
) -> Result<Listing<AuditEntry>, LoadError> {
    let limit = page.limit.clamp(1, Page::LIMIT_MAX);
    let after = page.after.map(|id| id.to_string());
    let until = filter.until.map(|at| AuditId::first_at(at).to_string());
    let before = after.into_iter().chain(until).min().unwrap_or_else(|| "g".to_owned());
    let from = filter
        .from
        .map(|at| AuditId::first_at(at).to_string())
        .unwrap_or_default();
    let mut sql = "SELECT body_version, body FROM audit_entry WHERE id < $1 AND id >= $2".to_owned();
    let equal = [
        ("project_id", filter.project.map(|id| id.to_string())),
        ("subject", filter.subject.clone()),
    ];
    let equal: Vec<_> = equal
        .into_iter()
        .filter_map(|(column, value)| Some((column, value?)))
        .collect();
    for (place, (column, _)) in (3..).zip(&equal) {
        sql.push_str(&format!(" AND {column} = ${place}"));
    }
    sql.push_str(&format!(" ORDER BY id DESC LIMIT {}", bounded(limit + 1)));
    // Made of the words above and a number.
    let mut query = sqlx::query(AssertSqlSafe(sql)).bind(before).bind(from);
    for (_, value) in equal {
        query = query.bind(value);
    }
    let rows = query.fetch_all(&mut *connection).await?;
    let mut items = rows.iter().map(audit_row).collect::<Result<Vec<_>, _>>()?;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|entry| entry.id.0);
    Ok(Listing { items, next })
}

pub(crate) async fn operation(
    connection: &mut SqliteConnection,
    id: OperationId,
) -> Result<Option<Operation>, LoadError> {
    let sql = "SELECT body_version, body FROM operation WHERE id = $1";
    let row = sqlx::query(sql)
        .bind(id.to_string())
        .fetch_optional(&mut *connection)
        .await?;
    row.as_ref().map(operation_row).transpose()
}

pub(crate) async fn answer(
    connection: &mut SqliteConnection,
    project: ProjectId,
    key: &str,
) -> Result<Option<Answer>, LoadError> {
    let sql = "SELECT body_version, body FROM answer WHERE project_id = $1 AND request_key = $2";
    let row = sqlx::query(sql)
        .bind(project.to_string())
        .bind(key)
        .fetch_optional(&mut *connection)
        .await?;
    match row.map(|row| decode(Table::Answer, &row)).transpose()? {
        Some(Row::Answer(answer)) => Ok(Some(answer)),
        _ => Ok(None),
    }
}

fn bounded(limit: usize) -> i64 {
    limit.min(Page::LIMIT_MAX + 1) as i64
}

fn notice(row: &SqliteRow) -> Result<Notice, LoadError> {
    match decode(Table::Notice, row)? {
        Row::Notice(notice) => Ok(*notice),
        _ => unreachable!("a table decodes to its own kind"),
    }
}

fn operation_row(row: &SqliteRow) -> Result<Operation, LoadError> {
    match decode(Table::Operation, row)? {
        Row::Operation(operation) => Ok(*operation),
        _ => unreachable!("a table decodes to its own kind"),
    }
}

fn audit_row(row: &SqliteRow) -> Result<AuditEntry, LoadError> {
    match decode(Table::Audit, row)? {
        Row::Audit(entry) => Ok(*entry),
        _ => unreachable!("a table decodes to its own kind"),
    }
}

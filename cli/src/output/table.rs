//! Tables for people: columns padded to their widest cell, numbers to the right, no lines. Written here because it is
//! less code than a dependency needs in configuration.

use std::fmt;

/// Rows under a heading. Cells are trimmed of control characters, so that a name cannot move the cursor.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column heads.
    #[must_use]
    pub(crate) fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, surplus ones are dropped.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let clean = |c: String| c.chars().filter(|c| !c.is_control()).collect::<String>();
        let mut row: Vec<String> = cells.into_iter().map(clean).collect();
        row.resize(self.head.len(), String::new());
        self.rows.push(row);
    }

    /// Whether a column holds counts only (sizes such as `1.5 GiB` count as well).
    fn is_numeric(&self, column: usize) -> bool {
        let mut cells = self.rows.iter().map(|r| r[column].as_str()).filter(|c| !c.is_empty() && *c != "-").peekable();
        let is_number = |c: &str| c.split_whitespace().next().is_some_and(|n| n.parse::<f64>().is_ok());
        cells.peek().is_some() && cells.all(is_number)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell_width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.head.len()).map(|c| cell_width(c).max(self.head[c].len())).collect();
        let right: Vec<bool> = (0..self.head.len()).map(|c| self.is_numeric(c)).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded: Vec<String> = cells
                .enumerate()
                .map(|(c, text)| if right[c] { format!("{text:>w$}", w = widths[c]) } else { format!("{text:<w$}", w = widths[c]) })
                .collect();
            padded.join("  ").trim_end().to_owned()
        };
        writeln!(f, "{}", line(&mut self.head.iter().copied()))?;
        for row in &self.rows {
            writeln!(f, "{}", line(&mut row.iter().map(String::as_str)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_go_right() {
        let mut t = Table::new(&["NAME", "SNAPSHOTS", "OWNER"]);
        t.row(["golden".to_owned(), "2".to_owned(), "alice".to_owned()]);
        t.row(["a\u{1b}[2J".to_owned(), "10".to_owned(), String::new()]);
        assert_eq!(t.to_string(), "NAME    SNAPSHOTS  OWNER\ngolden          2  alice\na[2J           10\n");
    }

    #[test]
    fn an_empty_table_is_its_heading() {
        assert_eq!(Table::new(&["A", "B"]).to_string(), "A  B\n");
    }
}

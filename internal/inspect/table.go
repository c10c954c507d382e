// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package inspect

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// column is a column of a table. text/tabwriter would do, if it could align
// some columns to the right and others to the left.
type column struct {
	title  string
	number bool // aligned to the right
}

// blank is a cell that says nothing: the row goes on with the one before it.
const blank = " "

// table is text in columns.
type table struct {
	columns []column
	rows    [][]string // as many cells as there are columns; "" is shown as "-"
}

// columns returns columns that are aligned to the left.
func columns(titles ...string) []column {
	out := make([]column, 0, len(titles))
	for _, title := range titles {
		out = append(out, column{title: title})
	}
	return out
}

// numbers returns columns that are aligned to the right.
func numbers(titles ...string) []column {
	out := columns(titles...)
	for i := range out {
		out[i].number = true
	}
	return out
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// String returns a line of titles and one for each row. Columns are two blanks
// apart and no line ends in blanks.
func (t *table) String() string {
	widths := make([]int, len(t.columns))
	titles := make([]string, len(t.columns))
	for i, c := range t.columns {
		titles[i] = c.title
		widths[i] = utf8.RuneCountInString(c.title)
		for _, row := range t.rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(shown(row[i])))
		}
	}
	var out strings.Builder
	for _, row := range append([][]string{titles}, t.rows...) {
		var line strings.Builder
		for i, cell := range row {
			width := widths[i]
			if !t.columns[i].number {
				width = -width // to the left
			}
			fmt.Fprintf(&line, "%*s  ", width, shown(cell))
		}
		out.WriteString(strings.TrimRight(line.String(), " "))
		out.WriteByte('\n')
	}
	return out.String()
}

func shown(cell string) string {
	if cell == "" {
		return "-"
	}
	return cell
}
